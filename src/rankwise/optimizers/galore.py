"""Gradient low-rank projection."""

from ..core.subspaces import Carry, Projector, Refresh
from ..core.transforms import Transform
from ..projectors import Keep, WarmPower
from .adam import adam
from .project import project


def galore(
    *,
    rank: int | float,
    every: int | Refresh = 200,
    scale: float = 0.25,
    projector: Projector = WarmPower(),  # noqa: B008 (frozen)
    inner: Transform = adam(),  # noqa: B008 (frozen)
    carry: Carry = Keep(),  # noqa: B008 (frozen)
) -> Transform:
    """GaLore: Adam, or another transform, on a projection of each gradient to its leading directions.

    The subspace is found by power steps from the last one instead of an SVD, and layers take turns, so that no
    step stalls. What lies outside the subspace is dropped.

    >>> galore(rank=4).matrix.inner.scale
    0.25

    Args:
        rank: of the projection, or its share of the shorter side. Matrices with no longer side get ``inner``.
        every: steps between two choices of a layer's subspace, or a rule.
        scale: of the projected steps; lr is that of Adam divided by about this.
        projector: finds the subspace; ``Svd()`` is the paper's.
        inner: what runs inside, ``adafactor()`` for instance, and on vectors.
        carry: what becomes of moments when the subspace changes; the paper keeps them.

    References: Zhao et al., 2024, arXiv 2403.03507. There eps is 1e-6 and is added before the bias of the start
    is taken out, which matters where gradients are tiny; here it is as in torch's Adam. The published code is
    ``inner=adam(eps=1e-6, early_eps=True), every=Every(200, together=True), projector=Svd()``, but for the signs
    of singular vectors, which are arbitrary there, for square matrices, of which it projects the columns and this
    the rows, and for weight decay, which acts there after the step and here before it.
    """
    return project(projector, inner, rank=rank, every=every, scale=scale, carry=carry)
