"""Take the cheapest step down, again and again."""

import heapq
from collections.abc import Mapping

from ..core.choices import Ladder, check_budget


def greedy(ladders: Mapping[str, Ladder], budget: int) -> dict[str, int]:
    """Start from the dense layers and go down the step that adds the least error for what it saves.

    A step goes from one position of a ladder to the next lower one. Simple and often near the optimum for
    ladders of diminishing returns; :func:`water_filling` also sees past a bad first step.
    """
    check_budget(ladders, budget)
    costs = {name: ladder.costs.tolist() for name, ladder in ladders.items()}
    errors = {name: ladder.errors.tolist() for name, ladder in ladders.items()}
    picks = {name: len(each) - 1 for name, each in costs.items()}
    spent = sum(each[-1] for each in costs.values())
    heap: list[tuple[float, str]] = []

    def offer(name: str) -> None:
        i = picks[name]
        if i > 0:
            slope = (errors[name][i - 1] - errors[name][i]) / (costs[name][i] - costs[name][i - 1])
            heapq.heappush(heap, (slope, name))

    for name in ladders:
        offer(name)
    while spent > budget:
        _, name = heapq.heappop(heap)
        spent -= costs[name][picks[name]] - costs[name][picks[name] - 1]
        picks[name] -= 1
        offer(name)
    return picks
