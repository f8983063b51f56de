"""Groups of parameters as they are given, and states as they are loaded."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .parts import Part
from .spelling import meant
from .states import State, described, map_state
from .stored import refuse_batched_inside
from .transforms import Transform

Group = dict[str, Any]
KEYS = ("params", "param_names", "transform", "lr", "weight_decay")
NOTED = ("initial_lr", "max_lr", "min_lr", "swa_lr", "name")  # by schedulers, and by those who log


def as_group(given: Any) -> Group:
    """Return a group of a pair of parameters and a transform, or of a dictionary.

    Raises:
        ValueError: if it is neither, or has entries that nothing would look at.
    """
    if isinstance(given, Mapping):
        group = dict(given)
    elif isinstance(given, tuple) and len(given) == 2:
        group = {"params": given[0], "transform": given[1]}
    else:
        raise ValueError(f"give pairs of parameters and a transform, or groups; got {type(given).__name__}.")
    for key in group:
        if key not in (*KEYS, *NOTED):
            raise ValueError(
                f"a group has no entry {key!r}: {meant(key, KEYS)}Beside params and their transform it has "
                "lr and weight_decay; what a method is told, such as betas, goes into its transform."
            )
    if isinstance(group.get("params"), nn.Module):
        raise ValueError(f"give the parameters of {type(group['params']).__name__}, as by model.parameters().")
    if not isinstance(group.get("transform"), Transform):
        raise ValueError(f"each group needs a transform, such as adam(); got {group.get('transform')!r}.")
    return group


def check_group(group: Group) -> None:
    """Raise unless a group can be stepped."""
    for name in ("lr", "weight_decay"):
        value = group[name]
        if not isinstance(value, (int, float, Tensor)) or not 0 <= float(value) < float("inf"):
            raise ValueError(f"{name} must be a finite number >= 0, got {value!r}.")
    for param in group["params"]:
        if not param.is_floating_point():
            raise ValueError(f"parameters must be real floating-point numbers, got {param.dtype}.")
    described(group["transform"])
    refuse_batched_inside(group["transform"])


def with_written(state: State, written: State) -> State:
    """Return the state of a transform with that of writing, if there is one."""
    return {**state, "write": written} if written else state


def restored(blank: State, part: Part, saved: Any, number: int) -> dict[str, Any]:
    """Copy a saved state to where it belongs, in the shapes and types of a blank one.

    Raises:
        ValueError: if it is of another form.
    """

    def place(wanted: Tensor, value: Any) -> Tensor:
        form = (tuple(wanted.shape[1:]), wanted.dtype)
        if isinstance(value, Tensor):
            value = part.loaded(value)
        if not isinstance(value, Tensor) or (tuple(value.shape), value.dtype) != form:
            found = (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the state of parameter {number} has {found} in place of {form}.")
        device = part.param.device if wanted.is_meta else wanted.device
        # laid out as a new one is, so that sums round as they would have
        return torch.empty_like(wanted[0], device=device).copy_(value.detach())

    if _keys(blank) != _keys(saved):
        raise ValueError(f"the state of parameter {number} has other entries than the transform: {_keys(saved)}.")
    return map_state(place, blank, _with_empty(blank, saved))


def _keys(state: Any) -> Any:
    """The form of a state, without mappings that are empty: what flattens states, as torch may, loses them."""
    if not isinstance(state, Mapping):
        return None
    found = {key: _keys(value) for key, value in state.items()}
    return {key: keys for key, keys in found.items() if keys is None or keys}


def _with_empty(blank: State, saved: State) -> State:
    """Return a saved state with the empty mappings that a blank one has."""
    return {
        key: _with_empty(value, saved.get(key, {})) if isinstance(value, Mapping) else saved[key]
        for key, value in blank.items()
    }
