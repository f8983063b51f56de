"""A pull towards orthogonal matrices, instead of a constraint."""

import math
from dataclasses import dataclass

from torch import Tensor

from ..core.combining import by_shape, chain
from ..core.seen import wide
from ..core.transforms import Transform
from .sgd import sgd
from .tscnc import Penalty, check_weight


@dataclass(frozen=True, kw_only=True)
class NotOrthogonal(Penalty):
    """|W W' - s^2 I|^2 of matrices (k, m, n), m <= n: zero if and only if all singular values are s.

    Args:
        weight: of the penalty.
        scale: s.
    """

    weight: float
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_weight(self.weight)
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be a finite number > 0, got {self.scale}.")

    def slope(self, param: Tensor) -> Tensor:
        """4 (W W' - s^2 I) W."""
        gram = param @ param.mT
        gram.diagonal(dim1=-2, dim2=-1).sub_(self.scale**2)
        return 4 * gram @ param


def orthogonal_penalty(
    *,
    weight: float = 1e-2,
    scale: float = 1.0,
    inner: Transform = sgd(beta=0.9),  # noqa: B008 (frozen)
) -> Transform:
    """Add the gradient of weight |W' W - s^2 I|^2 of the shorter side to those of all matrices.

    Singular values are drawn to s with a pull that grows as their third power: steps of large matrices must be
    short. Convolutions are seen as (out, rest), as in :func:`rankwise.optimizers.stiefel`.

    >>> orthogonal_penalty(weight=0.1).parts[0].matrix.inner
    NotOrthogonal(weight=0.1, scale=1.0)

    Args:
        weight: of the penalty.
        scale: s.
        inner: what sees the sums, and vectors and scalars.

    References: Sokol and Park, 2020, arXiv 1810.03785; Bansal et al., "Can we gain more from orthogonality
        regularizations in training deep networks?", 2018, arXiv 1810.09102.
    """
    penalty = wide(NotOrthogonal(weight=weight, scale=scale))
    return chain(by_shape(matrix=penalty, other=sgd()), inner)
