"""Transforms that leave directions alone and change parameters after each step."""

import abc
import math
from dataclasses import dataclass

from torch import Tensor

from ..core.combining import by_shape
from ..core.states import State
from ..core.transforms import Transform
from .sgd import sgd


class Constraint(Transform):
    """A bound on parameters; norms of matrices (m, n) are those from root mean square to root mean square.

    A matrix that takes inputs x with mean(x^2) <= 1 to outputs with mean(y^2) <= c^2 has norm c, which is its
    largest singular value times sqrt(n / m). Parameters in half precision are rounded afterwards, so that norms
    are off by a little, and by more where a cap only follows the known length of steps, as ``lipschitz`` does;
    certificates are computed of what is stored.
    """

    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """Nothing happens to the direction."""
        return grad

    @property
    def constrains(self) -> bool:
        """Always."""
        return True

    @abc.abstractmethod
    def constrain(self, param: Tensor, state: State, lr: float, weight_decay: float) -> Tensor:
        """(k, m, n) -> (k, m, n)."""


@dataclass(frozen=True, kw_only=True)
class Limited(Constraint):
    """A bound on the norms of matrices.

    Args:
        limit: of the norm from root mean square to root mean square.
    """

    limit: float

    def __post_init__(self) -> None:
        check_limit(self.limit)


def unit(param: Tensor) -> float:
    """Return the largest singular value sqrt(m / n) of matrices (k, m, n) whose norm is one."""
    return math.sqrt(param.shape[-2] / param.shape[-1])


def of_matrices(constraint: Constraint) -> Transform:
    """Bound matrices, and let all else be."""
    return by_shape(matrix=constraint, other=sgd())


def check_limit(limit: float) -> None:
    """Raise unless a bound is a number above zero."""
    if not 0 < limit < math.inf:
        raise ValueError(f"limit must be a finite number > 0, got {limit}.")
