"""Constraints on the largest singular value alone, followed by power steps."""

import abc
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.methods import check_count
from ..core.states import State
from ..core.transforms import Transform
from ..linalg import draw_normal, leading_pair
from .constraint import Constraint, check_limit, of_matrices, unit


class Leading(Constraint):
    """Changes the largest singular value s1 of matrices (k, m, n), whose right vector is the state.

    Each step is ``steps`` power steps from the last vector.
    """

    steps: int
    exact: ClassVar[tuple[str, ...]] = ("vector",)

    def init(self, param: Tensor, index: Tensor) -> State:
        """A random vector."""
        return {"vector": draw_normal((param.shape[-1],), index, param)}

    def constrain(self, param: Tensor, state: State, lr: float, weight_decay: float) -> Tensor:
        """Add (wanted - s1) u v'."""
        left, size, right = leading_pair(param, state["vector"], self.steps)
        state["vector"].copy_(right.where(size[:, None] > 0, state["vector"]))
        change = (self.wanted(size, unit(param), lr) - size)[:, None] * left
        return param.baddbmm(change[:, :, None], right[:, None, :])

    @abc.abstractmethod
    def wanted(self, size: Tensor, unit: float, lr: float) -> Tensor:
        """Return what the largest singular values (k,) become."""


@dataclass(frozen=True, kw_only=True)
class SpectralHammer(Leading):
    """Set the largest singular value to the limit, also where it is below.

    Args:
        limit: of the norm from root mean square to root mean square.
        steps: power steps at each step.
    """

    limit: float
    steps: int = 2

    def __post_init__(self) -> None:
        check_limit(self.limit)
        check_count("steps", self.steps)

    def wanted(self, size: Tensor, unit: float, lr: float) -> Tensor:
        """The limit."""
        return (size * 0 + self.limit * unit).where(size > 0, size)


@dataclass(frozen=True, kw_only=True)
class SpectralDecay(Leading):
    """Multiply the largest singular value by 1 - lr rate.

    Args:
        rate: of the decay.
        steps: power steps at each step.
    """

    rate: float
    steps: int = 2

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        if not self.rate >= 0:
            raise ValueError(f"rate must be >= 0, got {self.rate}.")

    def wanted(self, size: Tensor, unit: float, lr: float) -> Tensor:
        """A little less."""
        return size * (1 - lr * self.rate)


def spectral_hammer(*, limit: float, steps: int = 2) -> Transform:
    """Set the largest singular value of all matrices to a limit, and leave the others.

    There is no guarantee: the second may be larger, until its turn comes. For steps of low rank, such as
    Adam's. The vector is kept from step to step, so that few power steps follow it.

    >>> spectral_hammer(limit=1.0).matrix
    SpectralHammer(limit=1.0, steps=2)

    Args:
        limit: of the norm from root mean square to root mean square, sqrt(n / m) times the largest singular
            value.
        steps: power steps at each step.

    References: Newhouse et al., 2025, arXiv 2507.13338.
    """
    return of_matrices(SpectralHammer(limit=limit, steps=steps))


def spectral_decay(*, rate: float, steps: int = 2) -> Transform:
    """Let the largest singular value of all matrices decay, and leave the others.

    Where steps have norms up to c, it settles below about c / rate, as all singular values do with the
    ``weight_decay`` of the optimiser.

    >>> spectral_decay(rate=0.1).matrix
    SpectralDecay(rate=0.1, steps=2)

    Args:
        rate: times lr of the step, as of weight decay; that the paper counts lr in is not verified.
        steps: power steps at each step.

    References: Newhouse et al., 2025, arXiv 2507.13338; Yoshida and Miyato, 2017, arXiv 1705.10941, as a
        penalty.
    """
    return of_matrices(SpectralDecay(rate=rate, steps=steps))
