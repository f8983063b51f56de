"""Projected Adam for the factors of an adapter, and Adam for the lengths of its rows."""

from dataclasses import dataclass

from torch import Tensor

from ..core.combining import by_shape
from ..core.seen import wide
from ..core.states import State
from ..core.subspaces import Projector, Refresh, Subspace
from ..core.transforms import Transform
from ..projectors import Every, Keep, WarmPower
from .adam import adam
from .galore import galore
from .project import Project


@dataclass(frozen=True)
class Transposed(Transform):
    """Show matrices (k, m, n) as (k, n, m)."""

    inner: Transform

    def init(self, param: Tensor, index: Tensor) -> State:
        """The state of the transposed."""
        return self.inner.init(param.mT, index)

    @property
    def reads_param(self) -> bool:
        """As what it shows them to."""
        return self.inner.reads_param

    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """(k, m, n) -> (k, m, n)."""
        return self.inner.update(grad.mT, state, param.mT).mT


def grad_norm_lorp(
    *,
    rank: int | float = 4,
    every: int | Refresh = 500,
    scale: float = 4.0,
    two_sided: bool = False,
    projector: Projector = WarmPower(),  # noqa: B008 (frozen)
    inner: Transform = adam(eps=1e-6),  # noqa: B008 (frozen)
) -> Transform:
    """The optimiser of GradNormLoRP: projected gradients of low-rank factors, plain Adam for vectors.

    For what :class:`rankwise.adapters.GradNormLorp` trains. It is :func:`galore` with other defaults, or with
    ``two_sided`` the formula of the paper, U inner(U' G V) V'. A projection to as many directions as the
    factors have columns is a rotation that saves nothing, as in the published scripts; factors of rank up to
    ``rank`` get ``inner`` itself here. To train whole weights by direction and length there is
    :func:`weight_norm`.

    >>> grad_norm_lorp().matrix.inner.scale
    4.0

    Args:
        rank: of the projection, below that of the factors.
        every: steps between two choices of a parameter's subspace, or a rule.
        scale: of the projected steps.
        two_sided: project the other side to as many directions, too: the state is rank^2 numbers, and the
            bases.
        projector: finds the subspaces; ``Svd()`` is the paper's.
        inner: what runs inside, and on vectors.

    References: Huang et al., "Gradient weight-normalized low-rank projection for efficient LLM training", AAAI
        2025, arXiv 2412.19616, whose formula is known from a summary. Their epsilon is added before the bias of
        the start is taken out.
    """
    if two_sided:
        if not isinstance(rank, int):
            raise ValueError(f"two_sided needs a whole number as rank, since the sides differ; got {rank}.")
        subspace = Subspace(
            projector=projector,
            rank=rank,
            refresh=every if isinstance(every, Refresh) else Every(every),
            carry=Keep(),
        )
        inside = Transposed(Project(subspace=subspace, inner=inner))
        outer = Project(subspace=subspace, inner=inside, scale=scale)
        return by_shape(matrix=wide(outer), other=inner, above=rank)
    return galore(rank=rank, every=every, scale=scale, projector=projector, inner=inner)
