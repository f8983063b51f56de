"""How much longer an optimiser makes columns of a projected gradient, and a limit on the growth of steps."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.states import State
from ..core.transforms import Transform

FLOOR = 1e-8
LEAST = 0.05


def lengths(x: Tensor, *, whole: bool = False) -> Tensor:
    """Return the 2-norms of columns (k, r, l) -> (k, 1, l), or of the whole (k, 1, 1)."""
    return torch.linalg.vector_norm(x, dim=(-2, -1) if whole else -2, keepdim=True)


def gains(direction: Tensor, low: Tensor, full: Tensor, share: float) -> Tensor:
    """Return direction / (low + 1e-8), all of which are lengths.

    A projection that holds hardly anything of a gradient, such as the sum of rows that cancel, says nothing about
    it, and the quotient has no bound. Below a twentieth of the length that a random projection is to be expected
    to have, sqrt(share) * full, that length takes its place.

    Args:
        direction: of what an optimiser makes of the projected gradient.
        low: of the projected gradient.
        full: of the gradient.
        share: rank of the projection, divided by the side.
    """
    expected = full * share**0.5
    return direction / (torch.where(low < LEAST * expected, expected, low) + FLOOR)


def sizes(values: Tensor) -> Tensor:
    """Return the 2-norms of stacked parameters (k, ...) -> (k, 1, ...), of scalars (k,) their sizes."""
    axes = tuple(range(1, values.ndim))
    return torch.linalg.vector_norm(values, dim=axes, keepdim=True) if axes else values.abs()


@dataclass(frozen=True, kw_only=True)
class GrowthLimit(Transform):
    """Shorten steps so that their norm grows at most by a factor from one to the next; zeros do not count.

    Args:
        factor: of the last norm, as it was let through.

    References: Chen et al., "Fira", 2024, arXiv 2410.01623.
    """

    factor: float = 1.01

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise ValueError(f"a limit of growth must be at least 1, got {self.factor}.")

    def init(self, param: Tensor, index: Tensor) -> State:
        """The last norm; none yet."""
        return {"norm": param.new_zeros(len(param))}

    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """(k, ...) -> (k, ...)."""
        last = state["norm"]
        norm = sizes(grad).flatten()
        let = torch.where(last > 0, torch.minimum(norm, self.factor * last), norm)
        share = torch.where(norm > 0, let / norm, torch.ones_like(norm))
        last.copy_(torch.where(norm > 0, let, last))
        return grad * share.view(-1, *[1] * (grad.ndim - 1))
