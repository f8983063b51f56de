"""Tensors that stand in several layers, as transformers is told of them."""

from typing import Any

from torch import nn

from .extended import Extended
from .surgery import StructuredLinear


def declare_ties(model: nn.Module) -> None:
    """Mark what layers have in common, so that ``save_pretrained`` and Trainer write it once, by its first name.

    transformers refuses to write a tensor under two names unless a module says so in ``_tied_weights_keys``.
    """
    first: dict[int, str] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, (StructuredLinear, Extended)):
            continue
        names = layer.state_dict(keep_vars=True, prefix=f"{path}.")
        again = [name for name, tensor in names.items() if first.setdefault(id(tensor), name) != name]
        found: Any = layer
        found._tied_weights_keys = {name.removeprefix(f"{path}."): first[id(names[name])] for name in again}
