"""Parameters of one shape that are stepped together."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from .directions import Direction, Factors, formed
from .parts import Part
from .states import State, leaves, map_state
from .transforms import Transform, working_type
from .writing import Write


@dataclasses.dataclass(frozen=True, eq=False)
class Stack:
    """Parameters that were last stepped together, their states, and a tensor without values of their shape.

    ``handed`` are the tensors that each parameter's own state consists of, views of the stack's.
    """

    parts: tuple[Part, ...]
    state: State
    shape: Tensor
    handed: Mapping[Tensor, list[Tensor]] = dataclasses.field(default_factory=dict)

    def knows(self, param: Tensor, state: State | None) -> bool:
        """Whether a parameter's own state is still what was handed out: nobody has put other tensors there."""
        own = self.handed.get(param)
        if own is None or state is None:
            return False
        found = leaves(state)
        return len(found) == len(own) and all(a is b for a, b in zip(found, own, strict=True))

    def alone(self, param: Tensor) -> "Stack":
        """Return views that belong to one of the parameters."""
        i = next(i for i, part in enumerate(self.parts) if part.param is param)
        state = map_state(lambda value: value[i : i + 1], self.state)
        return Stack((self.parts[i],), read_only(state), self.shape[i : i + 1])

    def holds(self, params: list[Tensor]) -> bool:
        """Whether it is of these parameters and no others."""
        same = zip(params, self.parts, strict=False)
        return len(params) == len(self.parts) and all(param is part.param for param, part in same)

    def seen(self, write: Write) -> Tensor:
        """Return the parameters, or only their shape where their values are not read."""
        if not self.parts[0].transform.reads_param:
            return self.shape
        return joined(write.read([part.value() for part in self.parts]), self.parts[0].transform)


def together(members: Sequence[Tensor], states: Mapping[Tensor, State]) -> list[list[Tensor]]:
    """Say which parameters that have gradients are stepped together: all, or each alone.

    Where others that were stepped before have none, as experts that are not chosen, a stack would be a copy.
    """
    stepped = [param for param in members if param.grad is not None]
    waiting = any(param.grad is None and param.requires_grad and param in states for param in members)
    return [[param] for param in stepped] if waiting else [stepped]


def joined(values: Sequence[Tensor], transform: Transform) -> Tensor:
    """Stack tensors of one shape as a transform sees them; one alone is not copied."""
    stack = values[0].unsqueeze(0) if len(values) == 1 else torch.stack(list(values))
    return transform.shaped(stack.detach())


def stacked_gradients(parts: Sequence[Part]) -> Tensor:
    """Stack the gradients of parameters of one shape, in the type of steps."""
    gradients = [part.gradient() for part in parts]
    return joined(gradients, parts[0].transform).to(working_type(parts[0].param.dtype))


def owned(parts: Sequence[Part], seen: Tensor) -> list[Tensor]:
    """Return what this process holds of tensors (k, ...) that transforms make."""
    return [part.mine(each.reshape(part.shape)) for part, each in zip(parts, seen, strict=True)]


def each_direction(parts: Sequence[Part], seen: Direction) -> Sequence[Direction]:
    """Return the direction of each parameter; products stay such for matrices that are whole here."""
    if isinstance(seen, Factors) and len(parts[0].shape) == 2 and parts[0].layout is None:
        return seen.each()
    return owned(parts, formed(seen))


def stacked_values(*values: Tensor) -> Tensor:
    """Stack tensors in their order in memory, so that transposed matrices meet transposed states."""
    if values[0].ndim == 2 and values[0].stride(0) == 1:
        return torch.stack([value.mT for value in values]).mT
    return torch.stack(values)


def read_only(state: State) -> State:
    """Return a state whose entries cannot be replaced; its tensors can be written into."""
    return MappingProxyType(
        {key: read_only(value) if isinstance(value, Mapping) else value for key, value in state.items()}
    )
