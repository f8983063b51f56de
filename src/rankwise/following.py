"""The verbs that let adapters change by their schedules while they train, and end that."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from . import schedules
from .core.extended import Extended
from .core.following import Follower, Group, finished
from .core.methods import Schedule
from .core.report import Report
from .core.several import scheduled
from .core.surgery import refuse_followed
from .matrices import Base, Scheduled


def follow(model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int) -> Follower:
    """Let the schedules of an adapted model act around each step of its optimiser; nothing else has to be called.

    Call it once, after :func:`rankwise.adapt` or :func:`rankwise.initialise` and before the first step. It works
    in any loop, with summed gradients, ``GradScaler``, Accelerate, and a Trainer, see
    :func:`rankwise.trainer_callback`. Models whose adapters have no schedule can be followed, too:
    :func:`rankwise.check_adapters` then says which parameters never had a gradient. Parameters that FSDP or ZeRO
    cut into pieces cannot be followed.

    Args:
        model: has adapters, or matrices to train from scratch that have a schedule.
        optimizer: over their trained parameters.
        steps: how many steps the optimiser will take.

    Returns:
        what follows: keep it for ``state_dict()`` and, after the last step, ``finish()``.

    Raises:
        TypeError: if ``optimizer`` is none of torch's.
        ValueError: if there is no adapter, the optimiser lacks a parameter that a schedule acts on, one is
            followed already, or a schedule is unknown.

    >>> import torch, rankwise
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
    >>> report = rankwise.adapt(net, rankwise.adapters.AdaLora(rank=4, target=2))
    >>> optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    >>> follower = rankwise.follow(net, optimizer, steps=20)
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     net(torch.ones(1, 16)).square().sum().backward()
    ...     optimizer.step()
    >>> follower.finish().totals  # of 8
    {'rank': 4}
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer >= 1, the number of optimiser steps; got {steps!r}.")
    optimizer = _inner(optimizer)
    if not any(isinstance(part, (Base, Extended, Scheduled)) for part in model.modules()):
        raise ValueError("the model has no adapter to follow; call rankwise.adapt first.")
    groups = _groups(model)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for _, matrices in groups:
        for name, part in matrices.items():
            _check_trained(name, part, trained)
    return Follower(model, optimizer, steps, groups)


def finish(model: nn.Module) -> Report:
    """Leave of each matrix that trained by a schedule what the schedule leaves, in place, without the schedule.

    Of AdaLoRA the triplets whose values are not zero; of LaMDA all, its left factor frozen. A layer of which
    nothing is left is what it was before it was adapted. Parameters that remain are new ones: make a new
    optimiser to train on, which nothing needs to follow.

    Returns:
        a row for each matrix: its rank before and after.

    Raises:
        ValueError: if a matrix is followed; then use ``Follower.finish()``.

    >>> import torch, rankwise
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
    >>> _ = rankwise.adapt(net, rankwise.adapters.AdaLora(rank=4, target=2))
    >>> rankwise.finish(net).totals, net  # nothing has been trained
    ({'rank': 0}, Sequential(
      (0): Linear(in_features=16, out_features=16, bias=True)
      (1): Tanh()
      (2): Linear(in_features=16, out_features=8, bias=True)
    ))
    """
    refuse_followed(model)
    return finished(model, _groups(model))


def _groups(model: nn.Module) -> list[Group]:
    """Collect the matrices that share a schedule, but for adapters that are not in use."""
    groups: list[tuple[Schedule, dict[str, Scheduled]]] = []
    for name, part in scheduled(model).items():
        schedule = _schedule_of(name, part)
        known = next((matrices for other, matrices in groups if other == schedule), None)
        if known is None:
            groups.append((schedule, known := {}))
        known[name] = part
    return [*groups]


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """Return torch's optimiser inside those that Accelerate wraps around it."""
    inner = optimizer
    while isinstance(wrapped := getattr(inner, "optimizer", None), torch.optim.Optimizer):
        inner = wrapped
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    return inner


def _check_trained(name: str, part: Scheduled, trained: set[int]) -> None:
    missing = [key for key, p in part.named_parameters() if p.requires_grad and id(p) not in trained]
    if missing:
        raise ValueError(
            f"the optimiser has not {name}.{missing[0]}, which a schedule acts on; make the optimiser after "
            "rankwise.adapt, of all parameters that ask for gradients."
        )


def _schedule_of(name: str, part: Scheduled) -> Schedule:
    """Make the schedule that a matrix names."""
    fields: Mapping[str, Any] = {key: value for key, value in part.schedule.items() if key != "kind"}
    kind = part.schedule["kind"]
    if kind not in schedules.__all__:
        raise ValueError(f"layer {name}: unknown schedule {kind!r}; known are {', '.join(schedules.__all__)}.")
    try:
        return getattr(schedules, kind)(**fields)
    except TypeError as error:
        raise ValueError(f"layer {name}: {error}; it may be of another version.") from error
