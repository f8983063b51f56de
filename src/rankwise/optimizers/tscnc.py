"""Penalties that make weights sparse, and keep what is left well-conditioned."""

import abc
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.combining import by_shape, chain
from ..core.states import State
from ..core.transforms import Transform
from .adam import adam
from .sgd import sgd


class Penalty(Transform):
    """Adds the gradient of ``weight`` times a function of the parameters to gradients, as in the loss."""

    weight: float

    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """(k, m, n) -> (k, m, n)."""
        return grad.add(self.slope(param.to(grad.dtype)), alpha=self.weight)

    @property
    def reads_param(self) -> bool:
        """Always."""
        return True

    @abc.abstractmethod
    def slope(self, param: Tensor) -> Tensor:
        """Return the gradient of the penalty (k, m, n) in the type of the parameters, without its weight."""


@dataclass(frozen=True, kw_only=True)
class TransformedL1(Penalty):
    """Sum (a + 1) |w| / (a + |w|) over entries: between the number of entries (a = 0) and the sum of |w|.

    Large entries are pulled far less than small ones. At zero the gradient is zero.

    Args:
        weight: of the penalty.
        sharpness: a.
    """

    weight: float
    sharpness: float = 1.0

    def __post_init__(self) -> None:
        check_weight(self.weight)
        if not self.sharpness > 0:
            raise ValueError(f"sharpness must be > 0, got {self.sharpness}.")

    def slope(self, param: Tensor) -> Tensor:
        """Sign(w) a (a + 1) / (a + |w|)^2."""
        a = self.sharpness
        return param.sign() * (a * (a + 1)) / (a + param.abs()).square()


@dataclass(frozen=True, kw_only=True)
class ConditionGap(Penalty):
    """Log of the mean of squared singular values minus the mean of their logs: zero if and only if all are equal.

    It does not change with the scale of a matrix, nor when it is rotated. To each square a part of their mean
    is added, so that it is finite where the rank is not full; there condition numbers beyond 1 / sqrt(damping)
    cannot be told from each other.

    Args:
        weight: of the penalty.
        damping: that part.
    """

    weight: float
    damping: float = 1e-4

    def __post_init__(self) -> None:
        check_weight(self.weight)
        if not 0 < self.damping < 1:
            raise ValueError(f"damping must be > 0 and < 1, got {self.damping}.")

    def slope(self, param: Tensor) -> Tensor:
        """-2 / s (X X' + damping)^-1 X without its part along X, over the factor from W to X = W sqrt(s) / |W|.

        That part is what the changing norm |W| takes away: the value does not change along W.
        """
        scaled, size = _scaled(param)
        gram = scaled @ scaled.mT
        gram.diagonal(dim1=-2, dim2=-1).add_(self.damping)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        step = inverse @ scaled * (-2 / scaled.shape[-2])
        along = (step * scaled).sum((-2, -1), keepdim=True) / scaled.shape[-2]  # |X|^2 = s
        step = ((step - along * scaled) / size).to(param)
        return step.mT if param.shape[-2] > param.shape[-1] else step


def _scaled(param: Tensor) -> tuple[Tensor, Tensor]:
    """Return matrices (k, s, l), s <= l, whose squared singular values have the mean one, and the factor to them.

    In float64: next to a large singular value rounding in float32 is as large as the damping.
    """
    x = (param.mT if param.shape[-2] > param.shape[-1] else param).double()
    size = torch.linalg.matrix_norm(x, keepdim=True) / math.sqrt(x.shape[-2])
    size = torch.where(size > 0, size, 1.0)
    return x / size, size


def check_weight(weight: float) -> None:
    """Raise unless a penalty's weight is not negative."""
    if not 0 <= weight < math.inf:
        raise ValueError(f"the weight of a penalty must be a finite number >= 0, got {weight}.")


def tscnc(
    *,
    sparsity: float = 1e-5,
    condition: float = 1e-3,
    sharpness: float = 1.0,
    damping: float = 1e-4,
    inner: Transform = adam(),  # noqa: B008 (frozen)
) -> Transform:
    """Penalise many small entries, and singular values that differ, of all matrices, to prune them afterwards.

    Sparsity alone lets the smallest singular values fall faster than the largest. Both penalties are added to
    the loss, that is, to gradients before ``inner`` sees them; convolutions are seen as (out, rest).

    >>> [type(part).__name__ for part in tscnc().parts[0].matrix.parts]
    ['TransformedL1', 'ConditionGap']

    Args:
        sparsity: weight of the sum of (a + 1) |w| / (a + |w|).
        condition: weight of the gap between the logarithm of the mean square of singular values and the mean of
            logarithms of squares.
        sharpness: a; with a small one all entries but zeros count alike.
        damping: see the gap.
        inner: what sees the sums.

    References: Feng et al., "Lipschitz constant meets condition number", 2025, arXiv 2503.20454. Only its
        abstract was at hand: both functions are standard ones that fit its words, not the paper's own, and the
        weights are not the paper's either.
    """
    penalties = chain(
        TransformedL1(weight=sparsity, sharpness=sharpness), ConditionGap(weight=condition, damping=damping)
    )
    return chain(by_shape(matrix=penalties, other=sgd()), inner)
