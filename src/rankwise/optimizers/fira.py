"""Gradient low-rank projection, with a step of what lies outside of it."""

from dataclasses import dataclass

from torch import Tensor

from ..core.states import State
from ..core.subspaces import Carry, Projector, Refresh
from ..core.transforms import Transform
from ..projectors import Keep, WarmPower
from .adam import adam
from .gains import GrowthLimit, gains, lengths
from .project import Rest, project


@dataclass(frozen=True, kw_only=True)
class LikeInside(Rest):
    """Lengthen each column of the rest as much as the inner transform lengthens that of the projected gradient.

    Args:
        limit: of the growth of the step from one to the next.
        removes: which part of what lies inside the subspace is not in the rest.
    """

    limit: Transform
    removes: float = 1.0

    @property
    def removed(self) -> float:
        """The field."""
        return self.removes

    def init(self, param: Tensor, index: Tensor) -> State:
        """The state of the limit."""
        return self.limit.init(param, index)

    def update(self, rest: Tensor, low: Tensor, direction: Tensor, state: State) -> Tensor:
        """The step of the rest (k, s, l)."""
        above, below, beside = (lengths(x) for x in (direction, low, rest))
        whole = beside.hypot((self.removes * (2 - self.removes)) ** 0.5 * below)  # rest = G - removes * P R
        step = rest * gains(above, below, whole, low.shape[-2] / rest.shape[-2])
        return self.limit.update(step, state, step)


def fira(
    *,
    rank: int | float,
    every: int | Refresh = 200,
    scale: float = 0.25,
    growth: float = 1.01,
    removes: float = 1.0,
    projector: Projector = WarmPower(),  # noqa: B008 (frozen)
    inner: Transform = adam(),  # noqa: B008 (frozen)
    carry: Carry = Keep(),  # noqa: B008 (frozen)
) -> Transform:
    """Fira: GaLore, plus a step of what GaLore drops, so that steps have full rank with a state of low rank.

    With R = P'G projected and N what Adam makes of it, the step is scale * P N + limited((G - P R) f), where f is
    |N| / |R| of each column. With full rank it is Adam; the state is GaLore's and one number a matrix.

    >>> import torch
    >>> from rankwise.core.transforms import state_bytes
    >>> from rankwise.optimizers import galore
    >>> weight = torch.empty(64, 256, device="meta")
    >>> state_bytes(fira(rank=4), weight) - state_bytes(galore(rank=4), weight)
    4

    Args:
        rank: of the projection, or its share of the shorter side. Matrices with no longer side get ``inner``.
        every: steps between two choices of a layer's subspace, or a rule.
        scale: of the projected steps alone.
        growth: the largest factor from one norm of the other step to the next.
        removes: which part of P R is taken from G. The published code takes ``scale`` times P R, so that with
            0.25 three quarters of what lies inside are stepped by both parts: ``removes=scale`` does that.
        projector: finds the subspace; ``Svd()`` is the paper's, ``Cosine()`` makes DCT-Fira of arXiv 2505.17967.
        inner: what runs inside, and on vectors.
        carry: what becomes of moments when the subspace changes; the paper keeps them.

    References: Chen et al., 2024, arXiv 2410.01623. There norms are limited before the bias of Adam's start is
    taken out, and a step after a gradient of zeros is limited to 1e-8; here by the last norm above zero. There
    |R| has no least value: see :func:`rankwise.optimizers.gains.gains`.
    """
    if not 0 <= removes <= 1:
        raise ValueError(f"removes must be from 0 to 1, got {removes}.")
    rest = LikeInside(limit=GrowthLimit(factor=growth), removes=removes)
    return project(projector, inner, rank=rank, every=every, scale=scale, carry=carry, rest=rest)
