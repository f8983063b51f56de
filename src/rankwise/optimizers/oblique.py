"""Matrices whose columns keep one length."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.combining import by_shape
from ..core.transforms import Transform
from .manifolds import Manifold, OnManifold, moving
from .sgd import sgd


@dataclass(frozen=True, kw_only=True)
class Oblique(Manifold):
    """Matrices (k, m, n) with columns of length one."""

    def size(self, shape: torch.Size) -> float:
        """The root of n."""
        return math.sqrt(shape[-1])

    def tangent(self, values: Tensor, point: Tensor) -> Tensor:
        """Each column without its part along that of the point."""
        return values - point * (values * point).sum(-2, keepdim=True)

    def retract(self, moved: Tensor, start: Tensor | None) -> Tensor:
        """Columns divided by their lengths; those of zeros stay."""
        return moved / moved.norm(dim=-2, keepdim=True).clamp_min(torch.finfo(moved.dtype).tiny)


def oblique(
    *,
    beta: float | None = None,
    inner: Transform | None = None,
    scale: float | None = None,
    magnitude: Transform | None = None,
    other: Transform = sgd(beta=0.9),  # noqa: B008 (frozen)
) -> Transform:
    """Riemannian descent on matrices whose columns all have length s: softer than orthogonal ones.

    >>> oblique().matrix.manifold
    Oblique()

    Args:
        beta: as in :func:`rankwise.optimizers.stiefel`.
        inner: as there.
        scale: s; None takes the root mean square of the columns' lengths at the first step.
        magnitude: a transform that trains s, one number a matrix.
        other: for vectors and scalars, and matrices of one row or column.

    References: Absil and Gallivan, "Joint diagonalization on the oblique manifold", 2006; Sokol and Park, 2020,
        arXiv 1810.03785.
    """
    manifold = Oblique()
    matrix = OnManifold(manifold=manifold, inner=moving(manifold, beta, inner), scale=scale, magnitude=magnitude)
    return by_shape(matrix=matrix, other=other, above=1)
