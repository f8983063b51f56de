"""What happens to moments when the basis changes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.states import State, map_state
from ..core.subspaces import Carry, Measure
from ..core.transforms import Transform


@dataclass(frozen=True)
class Keep(Carry):
    """Keep the coordinates as they are, as GaLore does: right if the new basis is near the old one."""

    def __call__(self, inner: Transform, state: State, rotation: Measure, low: Tensor) -> None:
        """Change nothing."""


@dataclass(frozen=True)
class Rotate(Carry):
    """Carry the state to the new coordinates, as LDAdam does; what lies outside the new subspace is lost."""

    def __call__(self, inner: Transform, state: State, rotation: Measure, low: Tensor) -> None:
        """Let the transform rotate its state."""
        inner.rotate(state, rotation())


@dataclass(frozen=True)
class Reset(Carry):
    """Begin again with an empty state, as FRUGAL does."""

    def __call__(self, inner: Transform, state: State, rotation: Measure, low: Tensor) -> None:
        """Write the first state."""
        index = torch.zeros(len(low), dtype=torch.int64)
        map_state(lambda value, fresh: value.copy_(fresh), state, inner.init(low, index))
