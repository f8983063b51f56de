"""Ways back to matrices with orthonormal rows, after a step away from them."""

import abc
from dataclasses import dataclass

from torch import Tensor

from ..linalg import POLAR_EXPRESS, cayley, newton_schulz, orthonormal, stiefel_tangent

__all__ = ["Cayley", "Polar", "Qr"]  # what a command line may name
LAST = (1.875, -1.25, 0.375)
"""Takes 1 + e to 1 + 2.5 e^3 + ...: after ``POLAR_EXPRESS`` once is enough for float64."""


class Retraction(abc.ABC):
    """Brings matrices back to orthonormal rows that a step has taken away: R(0) = Q, and R'(0) is one."""

    @property
    def needs_start(self) -> bool:
        """Whether it reads where the step began, of which a copy is then kept."""
        return False

    @abc.abstractmethod
    def __call__(self, moved: Tensor, start: Tensor | None) -> Tensor:
        """Return matrices of orthonormal rows (k, m, n), m <= n.

        Args:
            moved: Q + step, (k, m, n).
            start: Q, if ``needs_start``.
        """


@dataclass(frozen=True)
class Polar(Retraction):
    """The nearest matrix of orthonormal rows, by products alone; a second-order retraction.

    Singular values below a thousandth of the Frobenius norm are only brought nearer to one, and zeros stay.
    """

    def __call__(self, moved: Tensor, start: Tensor | None) -> Tensor:
        """(k, m, n) -> (k, m, n)."""
        return newton_schulz(moved, (*POLAR_EXPRESS, LAST))


@dataclass(frozen=True)
class Qr(Retraction):
    """Rows made orthonormal one after the other, each with its sign; a first-order retraction."""

    def __call__(self, moved: Tensor, start: Tensor | None) -> Tensor:
        """(k, m, n) -> (k, m, n)."""
        return orthonormal(moved.mT).mT


@dataclass(frozen=True)
class Cayley(Retraction):
    """A rotation of the rows' space made of the step, for which a copy of the weight is kept.

    It is second-order for square matrices, else first-order (in the metric of plain gradients). The start is made
    orthonormal first, because Cayley's map keeps what rounding adds up.
    """

    @property
    def needs_start(self) -> bool:
        """Always."""
        return True

    def __call__(self, moved: Tensor, start: Tensor | None) -> Tensor:
        """(k, m, n) -> (k, m, n)."""
        assert start is not None
        point = Qr()(start, None)
        return cayley(stiefel_tangent(moved - start, point), point)
