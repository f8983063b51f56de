"""States of parameters: tensors with a leading axis of parameters, in mappings of mappings."""

import dataclasses
import functools
import hashlib
import inspect
import types
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

    A function without a name of its own, a lambda or one from within another, is told by what it computes: a
    digest of its code, in the version of Python at work, and the values that it uses from around it.

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
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, functools.partial):
        parts = {"function": value.func, "arguments": value.args, "named": [*value.keywords.items()]}
        return {"kind": "partial", **{name: described(part) for name, part in parts.items()}}
    if inspect.ismethod(value):
        return {"kind": value.__func__.__qualname__, "of": described(value.__self__)}
    if inspect.isfunction(value):
        return _local(value) if "<" in value.__qualname__ else value.__qualname__
    if inspect.isbuiltin(value) or isinstance(value, type):
        return value.__qualname__
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return [[described(key), described(each)] for key, each in value.items()]
    if callable(value) and hasattr(value, "__dict__") and not isinstance(value, (Tensor, torch.nn.Module)):
        return {"kind": type(value).__qualname__, **{name: described(each) for name, each in vars(value).items()}}
    raise ValueError(
        "fields of methods are plain values or dataclasses, types, functions, or callable objects of such, "
        f"so that reports and checkpoints can say what they are; got {value!r}."
    )


def told(function: Callable[..., Any]) -> Any:
    """Return a function that a caller gave as plain data, so that a checkpoint can tell it from another.

    Like :func:`described`, but where it holds what is no plain data, such as a model, its name must do.

    >>> told(lambda x: 2 * x) == told(lambda x: 3 * x), told(functools.partial(max, 1))["function"]
    (False, 'max')
    """
    try:
        return described(function)
    except ValueError:
        return getattr(function, "__qualname__", type(function).__qualname__)


def _local(function: Callable[..., Any]) -> dict[str, Any]:
    """Describe a function that its name does not tell."""
    around = inspect.getclosurevars(function)
    used = {**around.globals, **around.nonlocals}
    return {
        "kind": function.__qualname__,
        "code": hashlib.sha256(repr(_instructions(function.__code__)).encode()).hexdigest()[:16],
        "defaults": described([*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()]),
        "around": [[name, _named(each)] for name, each in sorted(used.items())],
    }


def _named(value: Any) -> Any:
    """Describe what a function uses; of other functions and of modules the name will do."""
    if inspect.ismodule(value):
        return value.__name__
    return value.__qualname__ if inspect.isfunction(value) else described(value)


def _instructions(code: types.CodeType) -> Any:
    return code.co_code.hex(), code.co_names, [_constant(each) for each in code.co_consts]


def _constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return _instructions(value)
    return sorted(map(repr, value)) if isinstance(value, frozenset) else value  # of which the order is no other's
