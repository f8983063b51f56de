"""The verb that shows whether adapters train."""

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .core.adapted import in_use
from .core.following import Follower
from .core.report import Report
from .core.surgery import base_of
from .matrices import Scheduled, StructuredMatrix

UNCHANGED = 1e-12  # relative, in float64: what trained factors and their frozen copies differ by is zero


def check_adapters(
    model: nn.Module,
    optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
    *,
    follower: Follower | None = None,
) -> Report:
    """Say for each adapted layer whether it trains; best called after two or three steps, before ``zero_grad``.

    A layer whose gradient is zero and that has not changed, one that has not changed though it has gradients, a
    parameter in none of the optimisers, numbers that are not finite, one whose gradient was zero in all steps
    that a follower saw (two at least), and a schedule that did not act: each is named in the title and in
    ``totals["problems"]``. That factors start at zero, so that others have no gradient at the first step, is
    none. Each weight is written out once, in float64. Of adapters with names only those in use are looked at.

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
    layers = in_use(model)
    if not layers:
        raise ValueError(
            "no layer of the model has an adapter in use; rankwise.adapt puts them in, fold takes them out. "
            "Modules behind layers, such as Compacter's, are not looked at."
        )
    if isinstance(optimizers, torch.optim.Optimizer):
        optimizers = [optimizers]
    owned = None if optimizers is None else _owned(optimizers)
    silent = set()
    if follower is not None and follower.done >= 2:
        silent = {id(p) for p in follower.silent.values()}
    rows = [_row(name, matrix, owned, silent) for name, matrix in layers.items()]
    problems = {row["name"]: row["problem"] for row in rows if row["problem"]}
    if owned is not None:
        inside = {id(p) for matrix in layers.values() for p in matrix.parameters()}
        others = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in owned | inside]
        problems |= {name: "in no optimiser" for name in others}
    totals = {
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": None if follower is None else follower.done,
        "problems": problems,
    }
    return Report(_title(rows, problems), rows, "layers", totals)


def _row(name: str, matrix: StructuredMatrix, owned: set[int] | None, silent: set[int]) -> dict[str, Any]:
    trained = {f"matrix.{key}": p for key, p in matrix.named_parameters() if p.requires_grad}
    gradients = [p.grad.detach().double().norm().cpu() for p in trained.values() if p.grad is not None]
    gradient = float(torch.stack(gradients).norm()) if gradients else None
    parts = [part for part in matrix.modules() if isinstance(part, Scheduled)]
    change = _change(matrix)
    found = []
    outside = [key for key, p in trained.items() if owned is not None and id(p) not in owned]
    if not trained:
        found.append("nothing trains")
    if outside:
        found.append(f"in no optimiser: {', '.join(outside)}")
    never = [key for key, p in trained.items() if id(p) in silent]
    if never:
        found.append(f"the gradient was always zero: {', '.join(never)}")
    if any(not part.acted for part in parts):
        found.append("its schedule never acted: call rankwise.follow")
    if not math.isfinite(change) or not math.isfinite(gradient or 0.0):
        found.append("its numbers are not finite: lower the learning rate or look at the data")
    if change <= UNCHANGED and trained and not (outside or never):
        found.append("no gradient and no change" if not gradient else "a gradient, but no change")
    return {
        "name": name,
        "trained": sum(p.numel() for p in trained.values()),
        "gradient": _number(gradient),
        "change": _number(change),
        "acted": min((part.acted for part in parts), default=None),
        "problem": "; ".join(found),
    }


def _number(value: float | None) -> float | None:
    """None where JSON has no word for it."""
    return value if value is not None and math.isfinite(value) else None


def _change(matrix: StructuredMatrix) -> float:
    """How far the weight is from what it was, relative to that."""
    with torch.no_grad():
        matrix = copy.deepcopy(matrix).double()
        base = base_of(matrix)
        assert base is not None
        before = base.dense()
        length = before.norm().clamp_min(torch.finfo(before.dtype).tiny)
        return float((matrix.dense() - before).norm() / length)


def _owned(optimizers: Iterable[torch.optim.Optimizer]) -> set[int]:
    return {id(p) for each in optimizers for group in each.param_groups for p in group["params"]}


def _title(rows: Sequence[Any], problems: dict[str, str]) -> str:
    if not problems:
        return f"{len(rows)} adapted layers train"
    name, problem = next(iter(problems.items()))
    more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
    bad = sum(bool(row["problem"]) for row in rows)
    return f"{bad} of {len(rows)} adapted layers have a problem: {name}: {problem}{more}"
