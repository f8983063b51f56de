"""The gradient itself, with lengths that Adam gives to a random projection of it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.combining import by_shape, chain
from ..core.methods import check_finite
from ..core.seen import wide
from ..core.states import State
from ..core.subspaces import Carry, Projector, Refresh, Subspace
from ..core.transforms import Transform
from ..projectors import Every, Keep, RandomOrthogonal
from .adam import adam
from .gains import GrowthLimit, gains, lengths
from .project import begin


@dataclass(frozen=True, kw_only=True)
class ProjectedGains(Transform):
    """Multiply columns of gradients (k, s, l) by how much a transform lengthens those of a projection.

    Args:
        subspace: where the transform works.
        inner: sees (k, r, l).
        whole: one factor for each matrix instead of one for each column.
        scale: of the step.
    """

    subspace: Subspace
    inner: Transform
    whole: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_finite("scale", self.scale)

    def init(self, param: Tensor, index: Tensor) -> State:
        """The states of the parts."""
        return begin(self.subspace, self.inner, param, index)

    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """(k, s, l) -> (k, s, l)."""
        self.subspace.follow(grad, state["subspace"], self.inner, state["inner"])
        low = self.subspace.projector.down(grad, state["subspace"]["basis"])
        direction = self.inner.update(low, state["inner"], torch.empty_like(low, device="meta"))
        above, below, full = (lengths(x, whole=self.whole) for x in (direction, low, grad))
        return grad * (self.scale * gains(above, below, full, low.shape[-2] / grad.shape[-2]))


def apollo(
    *,
    rank: int | float,
    every: int | Refresh = 200,
    scale: float = 0.5,
    growth: float = 1.01,
    whole: bool = False,
    projector: Projector = RandomOrthogonal(),  # noqa: B008 (frozen)
    inner: Transform = adam(),  # noqa: B008 (frozen)
    carry: Carry = Keep(),  # noqa: B008 (frozen)
) -> Transform:
    """APOLLO: each column of the gradient (of the shorter side) as long as Adam makes it on a random projection.

    Steps have full rank, and no basis is looked for or kept. The direction of each column is the gradient's own,
    so there is no momentum in directions, only in lengths.

    >>> apollo(rank=4).matrix.inner.parts[0].whole
    False

    Args:
        rank: of the projection, or its share of the shorter side. Matrices with no longer side get ``inner``.
        every: steps between two random projections, or a rule.
        scale: of the step; with 1 columns are about as long as Adam's. The published projection has normal
            entries of variance 1 / r instead of orthonormal rows, which makes factors sqrt(r / s) of these: its
            scale a is sqrt(a r / s) here, about 0.5 for the published settings (1 at a quarter of the side, 128
            at rank one).
        growth: the largest factor from one norm of the step to the next; ``inf`` for no limit.
        whole: one factor for each matrix instead of one for each column.
        projector: ``Svd()`` or ``WarmPower()`` is the paper's other choice.
        inner: what runs on the projection, and on vectors.
        carry: what becomes of moments when the projection changes; the paper keeps them.

    References: Zhu et al., MLSys 2025, arXiv 2412.05270. There norms are limited before the bias of Adam's start
    is taken out, and lengths of projections have no least value: see :func:`rankwise.optimizers.gains.gains`.
    Whether the published scale acts before or after the limit changes nothing but its 1e-8.
    """
    refresh = every if isinstance(every, Refresh) else Every(every)
    subspace = Subspace(projector=projector, rank=rank, refresh=refresh, carry=carry)
    lengthened = ProjectedGains(subspace=subspace, inner=inner, whole=whole, scale=scale)
    return by_shape(matrix=wide(chain(lengthened, GrowthLimit(factor=growth))), other=inner, above=rank)


def apollo_mini(
    *,
    every: int | Refresh = 200,
    scale: float = 0.5,
    growth: float = 1.01,
    inner: Transform = adam(),  # noqa: B008 (frozen)
) -> Transform:
    """APOLLO-Mini: :func:`apollo` of rank one, with one factor for each matrix.

    The direction of a step is the gradient's, and its state two numbers for each column.

    >>> import torch
    >>> from rankwise.core.transforms import state_bytes
    >>> from rankwise.optimizers import adam
    >>> weight = torch.empty(64, 256, device="meta")
    >>> state_bytes(adam(), weight) / state_bytes(apollo_mini(), weight) > 60
    True

    Args:
        every: steps between two random projections, or a rule.
        scale: of the step; see :func:`apollo`.
        growth: the largest factor from one norm of the step to the next.
        inner: what runs on the projection, and on vectors.
    """
    return apollo(rank=1, every=every, scale=scale, growth=growth, whole=True, inner=inner)
