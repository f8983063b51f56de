"""The verb that shows whether adapters train."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, nn

from .core.adapted import in_use
from .core.extended import extended
from .core.following import Follower
from .core.report import Report
from .core.surgery import base_of, structured
from .core.views import SliceView
from .matrices import Scheduled, StructuredMatrix, Sum
from .models.lines import lines_of, terms_beside

UNCHANGED = 1e-12  # relative, in float64: what trained factors and their frozen copies differ by is zero
ENOUGH = 2  # steps after which everything that trains has had a gradient: factors behind zeros get theirs late
FAR = 1e3  # relative: weights that grow so much leave no gradients, as where outputs saturate
AT_ONCE = 2**22  # numbers of a weight that are looked at together


def check_adapters(
    model: nn.Module,
    optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
    *,
    follower: Follower | None = None,
) -> Report:
    """Say for each adapted layer whether it trains; best called after two or three steps, before ``zero_grad``.

    A layer whose gradient is zero and that has not changed, one that has not changed though it has gradients, a
    parameter in none of the optimisers, numbers that are not finite, one whose gradient was zero in all steps
    with a learning rate that a follower saw (two at least), and a schedule that did not act: each is named in the
    title and in ``totals["problems"]``. Experts of a mixture that no token has reached are none, but stand in
    ``totals["unreached"]``. That factors start at zero, so that others have no gradient at the first step, is
    none; that a schedule leaves nothing of a layer is none either. Changes are measured in float64, some rows of
    a weight at a time where the adapter is a term beside it. Of a module behind a layer, such as Compacter's, the
    change is that of its outputs for normal random inputs. Of adapters with names those in use are looked at.

    Args:
        model: has adapters.
        optimizers: all that train it; without them it is not checked who trains what.
        follower: from :func:`rankwise.follow`; without it gradients are judged by those of this moment.

    Returns:
        a row for each layer: how many numbers train, the norm of their gradient (None if there is none now), the
        relative change of the weight, around how many steps its schedule acted (None if it has none), its
        problem.

    Raises:
        ValueError: if no layer has an adapter.

    >>> import torch, rankwise
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))
    >>> _ = rankwise.adapt(net, rankwise.adapters.Lora(rank=2))
    >>> optimizer = torch.optim.SGD(net[0].parameters(), lr=0.1)
    >>> net(torch.randn(4, 32)).square().sum().backward()
    >>> optimizer.step()
    >>> print(check_adapters(net, optimizer).title)
    1 of 2 adapted layers have a problem: 2: in no optimiser: matrix.members.1.matrix.left, ...
    """
    layers = _layers(model)
    if not layers:
        raise ValueError(
            "no layer of the model has an adapter in use; rankwise.adapt puts them in, fold takes them out."
        )
    if isinstance(optimizers, torch.optim.Optimizer):
        optimizers = [optimizers]
    owned = None if optimizers is None else _owned(optimizers)
    silent = {}
    if follower is not None and follower.moved >= ENOUGH:
        silent = {id(p): follower.seen.get(name, 0) for name, p in follower.silent.items()}
    rows = [_row(layer, owned, silent) for layer in layers]
    unreached = [row["name"] for layer, row in zip(layers, rows, strict=True) if _is_unreached(layer, row)]
    for row in rows:
        row["problem"] = "" if row["name"] in unreached else row["problem"]
    problems = {row["name"]: row["problem"] for row in rows if row["problem"]}
    if owned is not None:
        inside = {id(p) for layer in layers for p in layer.part.parameters()}
        others = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in owned | inside]
        problems |= {name: "in no optimiser" for name in others}
    totals = {
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": None if follower is None else follower.done,
        "problems": problems,
        "unreached": unreached,
    }
    return Report(_title(rows, problems, unreached), rows, "layers", totals)


@dataclass(frozen=True)
class _Layer:
    """A layer with an adapter.

    Args:
        name: of the layer.
        key: of the part in the layer.
        part: what holds the trained numbers.
        change: measures how far it is from what it was, relative to that.
        expert: whether it gets only the tokens that a mixture sends to it.
    """

    name: str
    key: str
    part: Any
    change: Callable[[Any], float]
    expert: bool = False


def _layers(model: nn.Module) -> list[_Layer]:
    experts = {name for name, layer in structured(model).items() if isinstance(layer.view, SliceView)}
    found = [_Layer(name, "matrix", matrix, _change, name in experts) for name, matrix in in_use(model).items()]
    behind = [_Layer(name, "after", layer.after, _change_behind) for name, layer in extended(model).items()]
    return [*found, *behind]


def _is_unreached(layer: _Layer, row: Mapping[str, Any]) -> bool:
    """Whether a mixture has sent no token to an expert."""
    waits = row["gradient"] is None and row["change"] is not None and row["change"] <= UNCHANGED
    return layer.expert and waits and row["trained"] > 0


def _row(layer: _Layer, owned: set[int] | None, silent: Mapping[int, int]) -> dict[str, Any]:
    trained = {f"{layer.key}.{key}": p for key, p in layer.part.named_parameters() if p.requires_grad}
    gradients = [p.grad.detach().double().norm().cpu() for p in trained.values() if p.grad is not None]
    gradient = float(torch.stack(gradients).norm()) if gradients else None
    parts = [part for part in layer.part.modules() if isinstance(part, Scheduled)]
    change = layer.change(layer.part)
    found = []
    outside = [key for key, p in trained.items() if owned is not None and id(p) not in owned]
    if not trained:
        found.append("nothing trains")
    if outside:
        found.append(f"in no optimiser: {', '.join(outside)}")
    few = range(1, ENOUGH) if not layer.expert else range(ENOUGH)  # gradients that say nothing yet
    never = [key for key, p in trained.items() if id(p) in silent and silent[id(p)] not in few]
    if any(part.acted for part in parts) and len(never) < len(trained):
        never = []  # a schedule may set what they are multiplied with to zero
    if never:
        found.append(f"the gradient was always zero: {', '.join(never)}{_diverged(change)}")
    if any(not part.acted for part in parts):
        found.append("its schedule never acted: call rankwise.follow")
    if not math.isfinite(change) or not math.isfinite(gradient or 0.0):
        found.append("its numbers are not finite: lower the learning rate or look at the data")
    if change <= UNCHANGED and trained and not (outside or never):
        if not gradient:
            found.append("no gradient and no change")
        elif not parts:  # a schedule may leave nothing of a layer
            found.append("a gradient, but no change")
    return {
        "name": layer.name,
        "trained": sum(p.numel() for p in trained.values()),
        "gradient": _number(gradient),
        "change": _number(change),
        "acted": min((part.acted for part in parts), default=None),
        "problem": "; ".join(found),
    }


def _diverged(change: float) -> str:
    """Say what a gradient of zero may come from where a weight became far too large."""
    return f" (the weight grew {change:.0e} times: lower the learning rate)" if change > FAR else ""


def _number(value: float | None) -> float | None:
    """None where JSON has no word for it."""
    return value if value is not None and math.isfinite(value) else None


def _change(matrix: StructuredMatrix) -> float:
    """How far a weight is from what it was, relative to that."""
    base = base_of(matrix)
    assert base is not None
    terms = terms_beside(matrix)
    with torch.no_grad():
        if not terms:
            matrix = copy.deepcopy(matrix).double()
            base = base_of(matrix)
            assert base is not None
        change = copy.deepcopy(Sum(*terms)).double() if terms else None
        moved = length = torch.zeros((), dtype=torch.float64)
        m, step = matrix.shape[0], max(1, AT_ONCE // matrix.shape[1])
        for start in range(0, m, step):
            stop = min(start + step, m)
            before = lines_of(base, 0, start, stop).double()
            new = lines_of(matrix if change is None else change, 0, start, stop)
            new = new - before if change is None else new
            moved, length = moved + new.square().sum().cpu(), length + before.square().sum().cpu()
        return float((moved / length.clamp_min(torch.finfo(length.dtype).tiny)).sqrt())


def _change_behind(module: nn.Module) -> float:
    """How far the outputs of a module are from its inputs, relative to these."""
    with torch.no_grad():
        wide: Any = copy.deepcopy(module).double()
        device = next(wide.parameters()).device
        inputs = torch.randn(64, wide.width, dtype=torch.float64, generator=Generator().manual_seed(0)).to(device)
        return float((wide(inputs) - inputs).norm() / inputs.norm())


def _owned(optimizers: Iterable[torch.optim.Optimizer]) -> set[int]:
    return {id(p) for each in optimizers for group in each.param_groups for p in group["params"]}


def _title(rows: Sequence[Any], problems: Mapping[str, str], unreached: Sequence[str]) -> str:
    rest = f"; no token reached {len(unreached)} experts, such as {unreached[0]}" if unreached else ""
    if not problems:
        return f"{len(rows) - len(unreached)} adapted layers train{rest}"
    name, problem = next(iter(problems.items()))
    more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
    bad = sum(bool(row["problem"]) for row in rows)
    return f"{bad} of {len(rows)} adapted layers have a problem: {name}: {problem}{more}{rest}"
