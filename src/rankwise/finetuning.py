"""The verb that trains what asks for gradients, such as adapters."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .core.adapted import suggested_rates
from .core.data import batches_of, check_held_out, parted
from .core.extended import Extended
from .core.following import Follower
from .core.labels import Labels, given
from .core.modes import in_float32, recomputing
from .core.plan import Plan, between_looks
from .core.processes import several
from .core.rates import GENERAL, WHOLE, Cosine, check_rate
from .core.report import Report
from .core.running import Run
from .core.several import check_one, scheduled
from .core.statistics import Batch
from .core.supervision import train_supervised
from .following import follow
from .guarding import Guard
from .matrices import Base
from .models.causal import check_tokens
from .models.labelled import are_ahead, check_decoder, placed


def finetune(
    model: nn.Module,
    data: Tensor | Iterable[Batch],
    *,
    held_out: float | Sequence[Batch] = 0.1,
    optimizer: torch.optim.Optimizer | None = None,
    lr: float | None = None,
    loss: Labels = given,
    steps: int | None = None,
    accumulate: int = 1,
    rate: Callable[[float], float] | None = None,
    clip: float | None = 1.0,
    every: int | None = None,
    patience: int | None = None,
    autocast: torch.dtype | None = None,
    gradient_checkpointing: bool = False,
    checkpoint: str | Path | None = None,
    notify: Callable[[Mapping[str, int | None]], None] | None = None,
    window: int = 512,
    seed: int = 0,
) -> Report:
    """Train the parameters of a model that ask for gradients, in place, usually after :func:`adapt`.

    Some data judges the model. What was best there remains, which is the start where nothing was better; that
    holds after an interrupt or an error, too. Of adapters that change by a schedule the last numbers remain.
    Dropout is on while training; frozen batch normalisations keep their statistics. At the first look after two
    steps at a rate above zero :func:`rankwise.check_adapters` says whether each adapter trains; what does not is
    warned of.

    Args:
        model: any module.
        data: batches: token ids (b, t); mappings as the model takes them, whose ``labels`` are not handed to it;
            or sequences of arguments, the last being the labels. Or token ids, (t,) or (b, t), to be cut. Labels
            of sequences, (b, t), are the tokens themselves where the model is a causal language model of
            transformers, which learns each from those before it. Of all other models they stand at the positions
            of the logits that they are for.
        held_out: share of the batches kept aside to judge by, in (0, 1), or other batches for that.
        optimizer: over the trained parameters; its learning rates are the largest ones. None means AdamW without
            weight decay.
        lr: learning rate of that AdamW. None means what each adapter's class suggests as ``lr``, 5e-4 where it
            suggests nothing and for what trains whole beside adapters, and 5e-5 without adapters.
        loss: (model output, batch, generator) -> loss, summed over the labels; by default the cross entropy with
            the ``labels`` (-100 where there is none), else with the next tokens.
        steps: how many; None means one pass over the data.
        accumulate: batches of a step. Each label of a step counts the same, in whichever batch it is.
        rate: share of the learning rate where a share of the run is done; None means
            :class:`rankwise.core.rates.Cosine`, as EVA's authors do.
        clip: largest 2-norm of the gradient of all parameters, or None.
        every: steps between two looks at what judges, each followed by a checkpoint; None means at most ten.
        patience: stop after so many looks without a better one; None goes on to the end.
        autocast: run the model in this type. Trained parameters in half precision are kept in float32 meanwhile,
            and rounded at the end.
        gradient_checkpointing: compute activations again instead of keeping them; transformers' models only.
        checkpoint: a folder; the same call goes on from what is there, bit by bit.
        notify: is called with the predicted memory before the first step.
        window: length of the sequences that ids are cut into.
        seed: of the order of the data, what is kept aside, and dropout.

    Returns:
        a row for each look: step, seconds, labels seen, mean loss while training and on what judges. Totals say
        both before and after, what trains, the largest learning rates ``lr`` of the optimiser's groups, and
        ``memory`` in bytes: ``weights``, ``gradients`` and ``optimizer`` by count; ``activations`` that the
        largest batch keeps for the backward pass, measured, without what is needed for a moment only; their sum
        ``predicted``; and, measured, the ``peak`` of the whole process while training and its ``rise`` above what
        was there before, None where the system does not tell. ``adapters`` is what
        :func:`rankwise.check_adapters` said, None if there are none.

    Raises:
        ValueError: if an argument is wrong, there are several processes (``torch.distributed``), nothing trains,
            no adapter gets a gradient or changes, each row has its own, there are no labels or they do not fit,
            numbers are not finite, or the checkpoint is of another task or damaged.
        CalibrationError: if the data is empty.

    >>> import torch, rankwise
    >>> generator = torch.Generator().manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> _ = rankwise.adapt(net, rankwise.adapters.Lora(rank=2))
    >>> inputs = torch.randn(20, 16, 4, generator=generator)
    >>> report = finetune(net, [(x, (x[:, 0] > 0).long()) for x in inputs], lr=0.05, steps=40)
    >>> report.totals["held_out"]["after"] < report.totals["held_out"]["before"]
    True
    """
    if several():
        raise ValueError(
            "finetune trains in one process, but there are several, whose copies would differ; write a loop with "
            "DistributedDataParallel, or take transformers' Trainer, either together with rankwise.follow."
        )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _check(trained, accumulate, held_out, autocast)
    if lr is not None:
        check_rate(lr)
    if isinstance(data, str):
        raise TypeError(f"data must be token ids or batches, got {data!r}; see rankwise.models.read_examples.")
    if window < 2:
        raise ValueError(f"window must be >= 2, got {window}.")
    check_one(model)
    by_schedule = bool(scheduled(model))
    if patience is not None and by_schedule:
        raise ValueError("an adapter with a schedule must train to its end; leave patience out.")
    batches = batches_of(data, window=window)
    train, held = (batches, [*held_out]) if isinstance(held_out, Sequence) else parted(batches, held_out, seed)
    check_tokens(model, [*train, *held])
    check_decoder(model, [*train, *held])
    steps = math.ceil(len(train) / accumulate) if steps is None else steps
    optimizer = optimizer or torch.optim.AdamW(_groups(model, trained, lr), weight_decay=0.0)
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if lost := next((name for name, p in trained.items() if id(p) not in owned), None):
        raise ValueError(f"the optimizer lacks {lost}, which asks for gradients; make it after rankwise.adapt.")
    plan = Plan(
        seconds=math.inf,
        steps=steps,
        pieces=accumulate,
        every=between_looks(steps) if every is None else every,
        patience=patience,
        seed=seed,
        rate=rate or Cosine(),
        clip=clip,
        autocast=autocast,
    )
    with (
        _following(model, optimizer, steps) as follower,  # ends last: what it leaves is rounded already
        in_float32(list(trained.values())),
        recomputing(model, gradient_checkpointing),
    ):
        guard = Guard(model, optimizer, follower, steps)
        run, reason, memory = train_supervised(
            model,
            trained,
            optimizer,
            dataclasses.replace(plan, last=by_schedule),
            train,
            held,
            loss=placed(loss, model, [*train, *held]),
            ahead=are_ahead(model),
            followers={"schedules": follower} if by_schedule and follower is not None else {},
            checkpoint=checkpoint,
            notify=notify,
            looking=guard,
        )
    return _report(run, reason, memory, guard.report)


@contextmanager
def _following(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Iterator[Follower | None]:
    """Let schedules act around the optimiser's steps, and watch the gradients of adapters, if there are any."""
    if not any(isinstance(part, (Base, Extended)) for part in model.modules()):
        yield None
        return
    follower = follow(model, optimizer, steps=steps)
    try:
        yield follower
    except BaseException:
        follower.stop()
        raise
    follower.finish()


def _groups(model: nn.Module, trained: Mapping[str, nn.Parameter], lr: float | None) -> list[dict[str, Any]]:
    """Put parameters of one learning rate together."""
    suggested = suggested_rates(model)
    other = GENERAL if suggested else WHOLE
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in trained.values():
        groups.setdefault(lr if lr is not None else suggested.get(id(parameter), other), []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


def _report(run: Run, reason: str, memory: Mapping[str, int | None], checked: Report | None) -> Report:
    """Say how a run went."""
    progress = run.progress
    first = progress.history[0]["held_out"]
    totals = {
        "optimizer": type(run.optimizer).__name__,
        "lr": [float(rate) for rate in run.rates],
        **run.summary(),
        "stopped": reason,
        "memory": dict(memory),
        "adapters": None if checked is None else {"title": checked.title, **checked.to_dict()},
    }
    change = f"{first:.4f} -> {progress.best:.4f} nats a label"
    return Report(f"held-out loss {change} in {progress.step} steps; {reason}", progress.history, "looks", totals)


def _check(
    trained: Mapping[str, nn.Parameter],
    accumulate: int,
    held_out: float | Sequence[Batch],
    autocast: torch.dtype | None,
) -> None:
    if not trained:
        raise ValueError("no parameter of the model asks for gradients; call rankwise.adapt first.")
    if accumulate < 1:
        raise ValueError(f"accumulate must be >= 1, got {accumulate}.")
    check_held_out(held_out)
    short = next((name for name, p in trained.items() if p.dtype in (torch.bfloat16, torch.float16)), None)
    if short is not None and autocast is None:
        raise ValueError(
            f"{short} is in half precision, where small steps are lost; give autocast=torch.bfloat16."
        )
