"""Layers that a module stands behind."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


class Extended(nn.Module):
    """A layer, and a module that its outputs go through.

    Args:
        layer: any layer; its ``weight`` and ``bias`` are found here too, for code that asks for their types.
        after: takes its outputs.
        lr: the learning rate that is suggested for it.
    """

    def __init__(self, layer: nn.Module, after: nn.Module, lr: float | None = None) -> None:
        super().__init__()
        self.layer, self.after, self.lr = layer, after, lr

    @property
    def weight(self) -> Any:
        """Of the layer."""
        return self.layer.weight

    @property
    def bias(self) -> Any:
        """Of the layer."""
        return self.layer.bias

    def forward(self, input: Tensor) -> Tensor:
        """What comes out of the layer and the module behind it."""
        return self.after(self.layer(input))


def extended(model: nn.Module) -> Mapping[str, Extended]:
    """Return the layers that something stands behind, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Extended)}


def name_without(model: nn.Module) -> Callable[[str], str]:
    """Return what gives a name in a model the one that it would have if nothing stood behind layers."""
    inner = {f"{path}.layer": path for path in extended(model)}

    def plain(name: str) -> str:
        found = next((path for path in inner if f"{name}.".startswith(f"{path}.")), None)
        return name if found is None else inner[found] + name.removeprefix(found)

    return plain


def refuse_extended(model: nn.Module, why: str) -> None:
    """Raise ValueError if something stands behind a layer, which is no part of a weight."""
    for name in extended(model):
        raise ValueError(f"layer {name} has a module behind it that is no part of a weight, and {why}.")
