"""Runs over batches with labels: what goes with them, what a checkpoint is about, what memory they take."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ..matrices import StructuredMatrix
from .adapted import adapted, own_tensors
from .conditioning import Conditioning
from .data import digest_of_batches
from .fingerprint import digest_of
from .integer_weights import ChangingWeight
from .labels import Labels
from .memory import memory_bytes, peak_memory_bytes, reset_peak_memory, training_bytes
from .modes import kept, training
from .plan import Plan
from .running import Follower, Observe, Run
from .states import told
from .statistics import Batch
from .stepping import Stepping, Whole
from .supervised import Supervised

CHECKPOINT = "training.safetensors"
Memory = Mapping[str, int | None]


def train_supervised(
    model: nn.Module,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    train: Sequence[Batch],
    judges: Sequence[Batch],
    *,
    loss: Labels,
    ahead: bool,
    followers: Mapping[str, Follower] | None = None,
    checkpoint: str | Path | None = None,
    writes: bool = True,
    notify: Callable[[Memory], None] | None = None,
    looking: Callable[[], None] | None = None,
    observe: Observe | None = None,
    stepping: Stepping | None = None,
    conditioning: Conditioning | None = None,
    together: bool = False,
    gradients: int | None = None,
) -> tuple[Run, str, Memory]:
    """Train parameters on batches, judged by others, with memory predicted before and measured after.

    Args:
        model: any module.
        trained: the parameters that change, by their names in the model.
        optimizer: over these.
        plan: budgets and sizes.
        train: batches with labels.
        judges: batches with labels.
        loss: (model output, batch, generator) -> loss, summed over the labels.
        ahead: see :class:`rankwise.core.supervised.Supervised`.
        followers: what else goes into a checkpoint, by name.
        checkpoint: a folder, or None.
        writes: see :class:`rankwise.core.running.Run`.
        notify: is called with the predicted memory before the first step.
        looking: see :class:`rankwise.core.running.Run`.
        observe: see :class:`rankwise.core.running.Run`.
        stepping: takes the steps; None collects all gradients first.
        conditioning: makes natural gradients of them; only without ``stepping``. Its state is in the checkpoint.
        together: whether several processes share the losses of a step; only without ``stepping``.
        gradients: bytes of gradients at a time; None means all.

    Returns:
        the run, why it stopped, and the memory: predicted, and measured.

    Raises:
        ValueError: as :class:`rankwise.core.running.Run`, or if a batch has no label.
    """
    whole = Whole(optimizer, plan.clip, conditioning, together=together)
    pieces = [Supervised(batch, loss, plan.autocast, ahead, whole.note) for batch in train]
    held = [Supervised(batch, loss, plan.autocast, ahead) for batch in judges]
    buffers = _buffers(model, trained)
    changes = {f"{name}.change" for name in _integers(model)}  # always zero: what changes are the integers
    trained = {name: parameter for name, parameter in trained.items() if name not in changes}
    file, identity = None if checkpoint is None else Path(checkpoint) / CHECKPOINT, ""
    if file is not None:
        identity = _identity(model, plan, optimizer, loss, conditioning, [*trained, *buffers], train, judges)
    largest = max(pieces, key=lambda piece: piece.size)
    with kept(model, buffers), training(model):
        memory = training_bytes(model, optimizer, lambda: largest.loss(model), gradients=gradients)
    if conditioning is not None:
        samples = largest.samples(conditioning.capture.axis)
        more = conditioning.state_bytes(samples * (plan.pieces or 1), max(1, largest.rows // samples))
        memory = {**memory, "precondition": more, "predicted": (memory.pop("predicted") or 0) + more}
    if notify is not None:
        notify(memory)
    run = Run(
        model,
        trained,
        optimizer,
        plan,
        functools.partial(training, model),
        buffers=buffers,
        followers=followers,
        beside={} if conditioning is None else {"precondition": conditioning},
        identity=identity,
        describe=lambda: _described(model),
        file=file,
        writes=writes,
        looking=looking,
        stepping=stepping or whole,
        observe=observe,
    )
    rising, before = reset_peak_memory(run.device), memory_bytes(run.device)
    reason = run.run(pieces, held)
    peak = peak_memory_bytes(run.device)
    return run, reason, {**memory, "peak": peak, "rise": max(peak - before, 0) if rising else None}


def _buffers(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> list[str]:
    """Name what else may change or must fit: the rest of adapters, and buffers.

    Buffers stand beside trained parameters, or in modules without any, such as normalisations without weights and
    parametrisations; those of frozen matrices never change.
    """
    names: dict[str, None] = {}
    for name, layer in adapted(model).items():
        names |= dict.fromkeys(f"{name}.matrix.{key}" for key in own_tensors(layer.matrix))
    for name, each in _integers(model).items():
        names |= dict.fromkeys(f"{name}.matrix.{key}" for key in each.matrix.state_dict())
    for name, module in model.named_modules():
        alone = not isinstance(module, StructuredMatrix) and not any(True for _ in module.parameters())
        if alone or any(p.requires_grad for p in module.parameters(recurse=False)):
            kept = {key for key, _ in module.named_buffers(recurse=False)} - module._non_persistent_buffers_set
            names |= dict.fromkeys(f"{name}.{key}".removeprefix(".") for key in sorted(kept))
    return [name for name in names if name not in trained]


def _integers(model: nn.Module) -> dict[str, ChangingWeight]:
    """Return the weights that train as integers by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, ChangingWeight)}


def _identity(
    model: nn.Module,
    plan: Plan,
    optimizer: torch.optim.Optimizer,
    loss: Labels,
    conditioning: Conditioning | None,
    names: Sequence[str],
    *data: Sequence[Batch],
) -> str:
    """Say what a checkpoint is about, part by part."""
    changing = set(names)
    rest = {name: tensor for name, tensor in model.state_dict().items() if name not in changing}
    groups = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    about = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    about |= {
        "rate": told(plan.rate),
        "optimizer": [type(optimizer).__name__, groups],
        "lr": [group["lr"] for group in optimizer.param_groups],
        "loss": told(loss),
        "data": [digest_of_batches(part) for part in data],
        "model": digest_of(rest),
    }
    if conditioning is not None:
        about["precondition"] = conditioning.about()
    return json.dumps(about, default=str, sort_keys=True)


def _described(model: nn.Module) -> str:
    """Say which adapters there are, as they are now: schedules may change their sizes."""
    return json.dumps(
        {"adapters": {name: layer.matrix.spec() for name, layer in adapted(model).items()}}, sort_keys=True
    )
