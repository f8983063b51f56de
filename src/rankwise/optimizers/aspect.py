"""The length that steps of tall matrices have beside those of wide ones."""

from dataclasses import dataclass

from torch import Tensor

from ..core.states import State
from ..core.transforms import Transform


@dataclass(frozen=True)
class Aspect(Transform):
    """Multiply steps (k, m, n) by sqrt(max(1, m / n)); others stay."""

    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """(k, ...) -> (k, ...)."""
        return grad * max(1.0, grad.shape[-2] / grad.shape[-1]) ** 0.5 if grad.ndim == 3 else grad
