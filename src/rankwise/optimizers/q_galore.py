"""Gradient low-rank projection in few bits."""

from ..core.subspaces import Carry, Projector, Refresh
from ..core.transforms import Transform
from ..projectors import Backoff, Keep, Packed
from .galore import galore
from .quantised import adamw8bit


def q_galore(
    *,
    rank: int | float,
    every: int | Refresh = Backoff(),  # noqa: B008 (frozen)
    scale: float = 0.25,
    projector: Projector = Packed(),  # noqa: B008 (frozen)
    inner: Transform = adamw8bit(),  # noqa: B008 (frozen)
    carry: Carry = Keep(),  # noqa: B008 (frozen)
) -> Transform:
    """Q-GaLore's optimiser: bases of 4 bits, moments of 8 bits, and fits that become rare where subspaces stay.

    >>> import torch
    >>> from rankwise.core.transforms import state_bytes
    >>> weight = torch.empty(512, 1376, device="meta")
    >>> round(state_bytes(q_galore(rank=128), weight) / state_bytes(galore(rank=128), weight), 3)
    0.235

    Args:
        rank: of the projection, or its share of the shorter side. Matrices with no longer side get ``inner``.
        every: steps between two choices of a layer's subspace, or a rule.
        scale: of the projected steps.
        projector: finds the subspace; ``Packed(projector=Svd())`` as in the paper.
        inner: what runs inside, and on vectors.
        carry: what becomes of moments when the subspace changes.

    References: Zhang et al., "Q-GaLore", 2024, arXiv 2407.08296. The paper's weights of 8 bits are those of
    :func:`rankwise.train_as_integers`; with bfloat16 weights :class:`rankwise.StochasticRounding` keeps small
    steps.
    """
    return galore(rank=rank, every=every, scale=scale, projector=projector, inner=inner, carry=carry)
