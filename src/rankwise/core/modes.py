"""How a model stands while it trains or is looked at, and how it goes back."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Put a model in training mode, but for batch normalisations that do not train, and put it back.

    Those without parameters train where all of the model does.
    """
    before = {module: module.training for module in model.modules()}
    whole = all(p.requires_grad for p in model.parameters())
    try:
        model.train()
        for module in model.modules():
            flags = [p.requires_grad for p in module.parameters()]
            if isinstance(module, _BatchNorm) and not (any(flags) if flags else whole):
                module.eval()
        yield
    finally:
        for module, flag in before.items():
            module.training = flag


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode without parameter gradients, and put everything back.

    Encoder layers of torch then call the layers within them, too, which their fast path does not.
    """
    training = {module: module.training for module in model.modules()}
    gradients = {parameter: parameter.requires_grad for parameter in model.parameters()}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval().requires_grad_(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, flag in training.items():
            module.training = flag
        for parameter, flag in gradients.items():
            parameter.requires_grad_(flag)


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Have a model of transformers keep no keys and values, which nobody reads where it sees whole texts."""
    config: Any = getattr(model, "config", None)
    inner = [config.get_text_config()] if hasattr(config, "get_text_config") else []
    parts = {id(part): part for part in (config, *inner) if hasattr(part, "use_cache")}
    before = {key: part.use_cache for key, part in parts.items()}
    try:
        for part in parts.values():
            part.use_cache = False
        yield
    finally:
        for key, part in parts.items():
            part.use_cache = before[key]


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
    before = bool(getattr(model, "is_activation_checkpointing", False))
    model.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        if not before:
            model.activation_checkpointing_disable()


@contextmanager
def kept(model: nn.Module, buffers: Sequence[str]) -> Iterator[None]:
    """Give buffers, such as running means, the values back that they had."""
    state = model.state_dict(keep_vars=True)
    before = {name: state[name].detach().clone() for name in buffers}
    yield
    with torch.no_grad():
        for name, value in before.items():
            state[name].copy_(value)


@contextmanager
def in_float32(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Keep parameters in float32 where they are shorter; round them at the end."""
    kinds = {p: p.dtype for p in parameters if p.dtype in (torch.bfloat16, torch.float16)}
    try:
        for parameter in kinds:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, kind in kinds.items():
            parameter.data = parameter.data.to(kind)
