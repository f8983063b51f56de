"""One price for a unit of the budget in all layers."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.choices import Ladder, check_budget, cost_of

MOST_STATES = 4096  # partial allocations that the last step keeps; small problems never reach it


def water_filling(ladders: Mapping[str, Ladder], budget: int) -> dict[str, int]:
    """Minimise the sum of the errors under the budget; the errors must be comparable between layers.

    Each layer takes the choice with the least error + price * cost, and the price is bisected until the budget
    is met (Lagrangian relaxation of the multiple-choice knapsack). Its bound on the optimum then leaves few
    choices that could still be in a better allocation; these are combined exactly, layer by layer, with
    dominated combinations dropped. The result is optimal unless more than ``MOST_STATES`` combinations remain
    in play, and never worse than the relaxation's.

    References: Everett, "Generalized Lagrange multiplier method", 1963; Pisinger, "A minimal algorithm for the
        multiple-choice knapsack problem", 1995 (the reduction by bounds).
    """
    check_budget(ladders, budget)
    dense = {name: len(ladder.costs) - 1 for name, ladder in ladders.items()}
    if cost_of(ladders, dense) <= budget:
        return dense
    price = _price(ladders, budget)
    incumbent = _fill(ladders, budget, _answer(ladders, price))
    bound = (
        sum(float((ladder.errors + price * ladder.costs).min()) for ladder in ladders.values()) - price * budget
    )
    return _combine(ladders, budget, price, incumbent, _error(ladders, incumbent) - bound)


def _answer(ladders: Mapping[str, Ladder], price: float) -> dict[str, int]:
    """What every layer takes at a price; of equals, the cheapest."""
    return {name: int((ladder.errors + price * ladder.costs).argmin()) for name, ladder in ladders.items()}


def _error(ladders: Mapping[str, Ladder], picks: Mapping[str, int]) -> float:
    return sum(float(ladders[name].errors[i]) for name, i in picks.items())


def _price(ladders: Mapping[str, Ladder], budget: int) -> float:
    """The least price, to the last bit but a few, whose answers fit the budget."""
    tiny = torch.finfo(torch.float64).tiny
    high = max(float(ladder.errors.max()) for ladder in ladders.values()) + tiny
    while cost_of(ladders, _answer(ladders, high)) > budget:
        high *= 2
    low = high * 1e-30
    for _ in range(100):
        middle = (low * high) ** 0.5
        if cost_of(ladders, _answer(ladders, middle)) > budget:
            low = middle
        else:
            high = middle
        if high <= low * (1 + 1e-14):
            break
    return high


def _fill(ladders: Mapping[str, Ladder], budget: int, picks: dict[str, int]) -> dict[str, int]:
    """Spend what is left, best gain for its cost first."""
    left = budget - cost_of(ladders, picks)
    while left > 0:
        best: tuple[float, str, int] | None = None
        for name, i in picks.items():
            ladder = ladders[name]
            extra, gain = ladder.costs - ladder.costs[i], ladder.errors[i] - ladder.errors
            rate = torch.where((extra > 0) & (extra <= left), gain / extra.clamp_min(1), -torch.inf)
            j = int(rate.argmax())
            if rate[j] > 0 and (best is None or float(rate[j]) > best[0]):
                best = float(rate[j]), name, j
        if best is None:
            break
        _, name, j = best
        left -= int(ladders[name].costs[j] - ladders[name].costs[picks[name]])
        picks[name] = j
    return picks


def _combine(
    ladders: Mapping[str, Ladder], budget: int, price: float, incumbent: dict[str, int], gap: float
) -> dict[str, int]:
    """Search the allocations whose relaxed value is within ``gap`` of the bound."""
    cost, error = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    waste = torch.zeros(1, dtype=torch.float64)  # what the choices so far cost over the relaxation
    least = sum(int(ladder.costs.min()) for ladder in ladders.values())
    trail: list[tuple[Tensor, Tensor]] = []  # for each layer: the parent state, and the choice made
    for ladder in ladders.values():
        value = ladder.errors + price * ladder.costs
        loss = value - value.min()
        options = (loss <= gap).nonzero()[:, 0]
        least -= int(ladder.costs.min())
        cost = (cost[:, None] + ladder.costs[options]).flatten()
        error = (error[:, None] + ladder.errors[options]).flatten()
        waste = (waste[:, None] + loss[options]).flatten()
        keep = ((waste <= gap) & (cost + least <= budget)).nonzero()[:, 0]
        order = keep[error[keep].argsort(stable=True)]
        order = order[cost[order].argsort(stable=True)]  # by cost, then by error
        best = error[order].cummin(0).values
        better = torch.ones(len(order), dtype=torch.bool)
        better[1:] = error[order][1:] < best[:-1]
        order = order[better]
        if len(order) > MOST_STATES:
            order = order[waste[order].argsort(stable=True)[:MOST_STATES].sort().values]
        trail.append((order // len(options), options[order % len(options)]))
        cost, error, waste = cost[order], error[order], waste[order]
    if len(error) == 0 or float(error.min()) >= _error(ladders, incumbent):
        return incumbent
    state, picks = int(error.argmin()), {}
    for name, (parent, choice) in zip(reversed(list(ladders)), reversed(trail), strict=True):
        picks[name] = int(choice[state])
        state = int(parent[state])
    return {name: picks[name] for name in ladders}
