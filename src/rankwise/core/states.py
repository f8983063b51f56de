"""States of parameters: tensors with a leading axis of parameters, in mappings of mappings."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

State = Mapping[str, Any]
"""Tensors, or such mappings. Each tensor has the leading axis of parameters."""


def counter(index: Tensor, value: int = 0) -> Tensor:
    """Return a whole number for each parameter, (k,) on the CPU."""
    return torch.full_like(index, value, dtype=torch.int64)


def per_parameter(values: Sequence[float], like: Tensor) -> Tensor:
    """Bring one number a parameter to the shape (k, 1, ...), type and device of ``like``."""
    return moved(torch.tensor(values, dtype=like.dtype), like).view(-1, *[1] * (like.ndim - 1))


def moved(values: Tensor, like: Tensor) -> Tensor:
    """Bring numbers on the CPU to the type and device of ``like``, without waiting for that device."""
    return values.to(like.dtype).to(like.device, non_blocking=True)


def leaves(state: State) -> list[Tensor]:
    """Return all tensors of a state."""
    return [
        leaf for value in state.values() for leaf in (leaves(value) if isinstance(value, Mapping) else [value])
    ]


def map_state(function: Callable[..., Any], *states: State) -> dict[str, Any]:
    """Apply a function to the tensors of states of one form."""
    first, *others = states
    return {
        key: map_state(function, value, *(other[key] for other in others))
        if isinstance(value, Mapping)
        else function(value, *(other[key] for other in others))
        for key, value in first.items()
    }


def take(state: State, rows: Tensor) -> dict[str, Any]:
    """Return the states of some of the parameters, (k,) of numbers on the CPU; a copy."""
    return map_state(lambda value: value[rows.to(value.device)], state)


def put(state: State, rows: Tensor, new: State) -> None:
    """Write the states of some of the parameters."""
    map_state(lambda value, fresh: value.index_copy_(0, rows.to(value.device), fresh.to(value)), state, new)


def described(value: Any) -> Any:
    """Return a transform, or a field of one, as plain data: its name and its fields; of a function its name.

    >>> from rankwise.optimizers import sgd
    >>> described(sgd())
    {'kind': 'Momentum', 'beta': 0.0, 'nesterov': False, 'average': False}

    Raises:
        ValueError: if a field is not plain.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: described(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, (tuple, list)):
        return [described(each) for each in value]
    if inspect.isfunction(value):
        return value.__qualname__
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"fields of transforms are plain values or dataclasses, or functions, got {value!r}.")
