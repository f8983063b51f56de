"""Matrices that stay orthogonal, up to a number, while they are trained."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.combining import by_shape
from ..core.seen import wide
from ..core.transforms import Transform
from ..linalg import stiefel_tangent
from .manifolds import Manifold, OnManifold, moving
from .retractions import Polar, Retraction
from .sgd import sgd


@dataclass(frozen=True, kw_only=True)
class Stiefel(Manifold):
    """Matrices (k, m, n), m <= n, with orthonormal rows.

    Args:
        retraction: brings steps back.
    """

    retraction: Retraction = Polar()  # noqa: RUF009 (frozen)

    def size(self, shape: torch.Size) -> float:
        """The root of m."""
        return math.sqrt(shape[-2])

    def tangent(self, values: Tensor, point: Tensor) -> Tensor:
        """G - sym(G Q') Q."""
        return stiefel_tangent(values, point)

    @property
    def needs_start(self) -> bool:
        """As the retraction."""
        return self.retraction.needs_start

    def retract(self, moved: Tensor, start: Tensor | None) -> Tensor:
        """(k, m, n) -> (k, m, n)."""
        return self.retraction(moved, start)


def stiefel(
    *,
    beta: float | None = None,
    inner: Transform | None = None,
    retraction: Retraction = Polar(),  # noqa: B008 (frozen)
    scale: float | None = None,
    magnitude: Transform | None = None,
    other: Transform = sgd(beta=0.9),  # noqa: B008 (frozen)
) -> Transform:
    """Riemannian descent: all singular values of a matrix stay equal to one number s.

    The shorter side is the orthonormal one: W' W = s^2 I for tall matrices, W W' = s^2 I for wide ones. Start
    from ``torch.nn.init.orthogonal_``; the first step takes any other matrix to a near orthogonal one.
    Convolutions are seen as (out, rest): that matrix is orthogonal, which does NOT make the convolution so, since
    its windows overlap.

    >>> stiefel(scale=1.0).matrix.inner.manifold
    Stiefel(retraction=Polar())

    Args:
        beta: of the momentum, which is carried along the manifold by projection; None means 0.9 if there is no
            ``inner``.
        inner: another transform of tangent gradients in its place, such as ``adam()``, or ``chain(sgd(beta=0.9),
            Orthogonalize())`` of Muon; its moments are not carried, but its directions are made tangent.
        retraction: ``Polar()``, ``Qr()`` or ``Cayley()`` of :mod:`rankwise.optimizers.retractions`.
        scale: s; None takes the root mean square of singular values at the first step.
        magnitude: a transform that trains s, one number a matrix ("scaled Stiefel"), such as ``sgd(beta=0.9)``.
        other: for vectors and scalars.

    References: Edelman, Arias and Smith, "The geometry of algorithms with orthogonality constraints", 1998;
        Absil, Mahony and Sepulchre, "Optimization algorithms on matrix manifolds", 2008; for deep networks Sokol
        and Park, "Information geometry of orthogonal initializations and training", 2020, arXiv 1810.03785,
        whose code is not published.
    """
    manifold = Stiefel(retraction=retraction)
    matrix = OnManifold(manifold=manifold, inner=moving(manifold, beta, inner), scale=scale, magnitude=magnitude)
    return by_shape(matrix=wide(matrix), other=other)
