"""Runs over batches with labels: what is lowered, which state goes with it, how much memory it takes."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .adapted import adapted, own_tensors
from .data import digest_of_batches
from .fingerprint import digest_of
from .healing import output_of
from .labels import Labels, count_given
from .memory import (
    activation_bytes,
    gradient_bytes,
    held_bytes,
    memory_bytes,
    optimizer_bytes,
    peak_memory_bytes,
    reset_peak_memory,
)
from .running import Follower, Observe, Piece, Plan, Run
from .statistics import Batch
from .stepping import Stepping

CHECKPOINT = "training.safetensors"
Memory = Mapping[str, int | None]


def supervised(
    model: nn.Module,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    train: Sequence[Batch],
    judges: Sequence[Batch],
    *,
    loss: Labels,
    followers: Mapping[str, Follower] | None = None,
    checkpoint: str | Path | None = None,
    notify: Callable[[Memory], None] | None = None,
    observe: Observe | None = None,
    stepping: Stepping | None = None,
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
        followers: what else goes into a checkpoint, by name.
        checkpoint: a folder, or None.
        notify: is called with the predicted memory before the first step.
        observe: see :class:`rankwise.core.running.Run`.
        stepping: takes the steps; None collects all gradients first.
        gradients: bytes of gradients at a time; None means all.

    Returns:
        the run, why it stopped, and the memory: predicted, and measured.

    Raises:
        ValueError: as :class:`rankwise.core.running.Run`, or if a batch has no label.
    """
    pieces, held = ([Supervised(batch, loss, plan.autocast) for batch in part] for part in (train, judges))
    buffers = _buffers(model, trained)
    file, identity = None if checkpoint is None else Path(checkpoint) / CHECKPOINT, ""
    if file is not None:
        identity = _identity(model, plan, optimizer, loss, [*trained, *buffers], train, judges)
    with _kept(model, buffers):
        largest = max(pieces, key=lambda piece: piece.size)
        memory = _memory(model, optimizer, largest, gradient_bytes(model) if gradients is None else gradients)
    if notify is not None:
        notify(memory)
    run = Run(
        model,
        trained,
        optimizer,
        plan,
        lambda: _training(model),
        buffers=buffers,
        followers=followers,
        identity=identity,
        file=file,
        stepping=stepping,
        observe=observe,
    )
    rising, before = reset_peak_memory(run.device), memory_bytes(run.device)
    reason = run.run(pieces, held)
    peak = peak_memory_bytes(run.device)
    return run, reason, {**memory, "peak": peak, "rise": max(peak - before, 0) if rising else None}


class Supervised(Piece):
    """A batch with labels.

    Args:
        batch: as :func:`rankwise.finetune` takes it.
        loss: (model output, batch, generator) -> loss, summed over the labels.
        autocast: run the model in this type.

    Raises:
        ValueError: if there is no label.
    """

    def __init__(self, batch: Batch, loss: Labels, autocast: torch.dtype | None) -> None:
        self.batch, self.compute, self.autocast = batch, loss, autocast
        self.count = count_given(batch)
        if self.count == 0:
            raise ValueError("a batch has no label that counts; leave it out.")

    @property
    def rows(self) -> int:
        """How many labels there are."""
        return self.count

    @property
    def size(self) -> int:
        """How many numbers its largest tensor has."""
        values = self.batch.values() if isinstance(self.batch, Mapping) else self.batch
        return max(value.numel() for value in [self.batch, *values] if isinstance(value, Tensor))

    def loss(self, model: nn.Module) -> Tensor:
        """Sum the loss over the labels."""
        output = output_of(model, _unlabelled(self.batch), self.autocast)
        return self.compute(output, self.batch, Generator())


def _unlabelled(batch: Batch) -> Batch:
    """Return what the model is given of a batch."""
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key != "labels"}
    return batch[:-1]


def _buffers(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> list[str]:
    """Name what else may change or must fit: the rest of adapters, and buffers beside trained parameters."""
    names: dict[str, None] = {}
    for name, layer in adapted(model).items():
        names |= dict.fromkeys(f"{name}.matrix.{key}" for key in own_tensors(layer.matrix))
    for name, module in model.named_modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            kept = {key for key, _ in module.named_buffers(recurse=False)} - module._non_persistent_buffers_set
            names |= dict.fromkeys(f"{name}.{key}".removeprefix(".") for key in sorted(kept))
    return [name for name in names if name not in trained]


@contextmanager
def _kept(model: nn.Module, buffers: Sequence[str]) -> Iterator[None]:
    """Give buffers, such as running means, the values back that they had."""
    state = model.state_dict(keep_vars=True)
    before = {name: state[name].detach().clone() for name in buffers}
    yield
    with torch.no_grad():
        for name, value in before.items():
            state[name].copy_(value)


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Put a model in training mode, but for batch normalisations that do not train, and put it back."""
    before = {module: module.training for module in model.modules()}
    try:
        model.train()
        for module in model.modules():
            if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters()):
                module.eval()
        yield
    finally:
        for module, flag in before.items():
            module.training = flag


@runtime_checkable
class _Checkpoints(Protocol):
    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict[str, Any]) -> None: ...
    def activation_checkpointing_disable(self) -> None: ...


@contextmanager
def recomputing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Let a model compute activations again in the backward pass instead of keeping them."""
    if not wanted:
        yield
        return
    if not isinstance(model, _Checkpoints):
        raise ValueError(
            f"{type(model).__name__} has no activation_checkpointing_enable; leave gradient_checkpointing out."
        )
    model.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.activation_checkpointing_disable()


def _memory(
    model: nn.Module, optimizer: torch.optim.Optimizer, piece: Supervised, gradients: int
) -> dict[str, int | None]:
    """Predict what training will hold."""
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _training(model):
        parts = {
            "weights": held_bytes(model),
            "gradients": gradients,
            "optimizer": optimizer_bytes(optimizer),
            "activations": activation_bytes(model, lambda: piece.loss(model)),
        }
    return {**parts, "predicted": sum(size or 0 for size in parts.values())}


def _identity(
    model: nn.Module,
    plan: Plan,
    optimizer: torch.optim.Optimizer,
    loss: Labels,
    names: Sequence[str],
    *data: Sequence[Batch],
) -> str:
    """Say in words what a checkpoint is about."""
    changing = set(names)
    rest = {name: tensor for name, tensor in model.state_dict().items() if name not in changing}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    settings = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    settings["rate"] = getattr(plan.rate, "__qualname__", repr(plan.rate))
    digests = [digest_of_batches(part) for part in data]
    about = [type(optimizer).__name__, groups, settings, getattr(loss, "__qualname__", repr(loss)), *digests]
    return f"{about} {digest_of(rest)}"
