"""Muon on a few directions of the momentum, which forgets what was stepped and keeps the rest."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.combining import by_shape, chain
from ..core.directions import Direction, add_to, formed
from ..core.seen import wide
from ..core.states import State
from ..core.subspaces import Projector, Refresh, Subspace
from ..core.transforms import Transform
from ..linalg import MUON
from ..projectors import Cosine, Every, Keep
from .adam import adam
from .aspect import Aspect
from .muon import Orthogonalize, muon
from .project import begin


@dataclass(frozen=True, kw_only=True)
class SpentMomentum(Transform):
    """Let a transform see a projection of the momentum, and take a part of this projection from the momentum.

    With M <- M + G and R = P'M, the step is P inner(R), and then M <- M - (1 - beta) P R. So only what was
    stepped is forgotten: the momentum is error feedback too.

    Args:
        subspace: of the momentum.
        inner: sees (k, r, l).
        beta: how much stays of what was stepped.
    """

    subspace: Subspace
    inner: Transform
    beta: float

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must be from 0 to below 1, got {self.beta}.")

    def init(self, param: Tensor, index: Tensor) -> State:
        """The momentum, and the states of the parts."""
        return {"momentum": torch.zeros_like(param), **begin(self.subspace, self.inner, param, index)}

    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """(k, s, l) -> (k, s, l)."""
        return formed(self.update_unformed(grad, state, param))

    def update_unformed(self, grad: Tensor, state: State, param: Tensor) -> Direction:
        """(k, s, l) -> (k, s, l), a product."""
        momentum = state["momentum"].add_(grad)
        self.subspace.follow(momentum, state["subspace"], self.inner, state["inner"])
        projector, basis = self.subspace.projector, state["subspace"]["basis"]
        low = projector.down(momentum, basis)
        step = self.inner.update(low, state["inner"], torch.empty_like(low, device="meta"))
        add_to(momentum, projector.lift(low, basis), factor=self.beta - 1)
        return projector.lift(step, basis)


def trion(
    *,
    rank: int | float,
    every: int | Refresh = 1,
    beta: float = 0.95,
    projector: Projector = Cosine(),  # noqa: B008 (frozen)
    polynomials: tuple[tuple[float, float, float], ...] = (MUON,) * 5,
    other: Transform = adam(betas=(0.9, 0.95), eps=1e-10),  # noqa: B008 (frozen)
) -> Transform:
    """Trion: orthogonalise only the strongest cosine frequencies of the momentum, chosen at each step.

    Newton-Schulz steps are on (r, l) matrices, and of a step only these and r numbers must be sent. With full
    rank it is Muon without Nesterov's look ahead, in any basis. With ``WarmPower()`` it is akin to
    Dion, which scales columns in place of Newton-Schulz steps.

    >>> trion(rank=8).matrix.parts[0].inner.beta
    0.95

    Args:
        rank: how many frequencies, or their share of the shorter side. Smaller matrices get Muon.
        every: steps between two choices, or a rule.
        beta: how much stays of what was stepped.
        projector: chooses.
        polynomials: of the Newton-Schulz iteration.
        other: for vectors and scalars.

    References: Modoranu et al., 2025, arXiv 2505.17967, where steps are also offered with other lengths, and
    frequencies are chosen by the sum of sizes; Ahn et al., "Dion", 2025, arXiv 2504.05295.
    """
    refresh = every if isinstance(every, Refresh) else Every(every)
    subspace = Subspace(projector=projector, rank=rank, refresh=refresh, carry=Keep())
    inside = SpentMomentum(subspace=subspace, inner=Orthogonalize(polynomials=polynomials), beta=beta)
    whole = muon(beta=beta, nesterov=False, polynomials=polynomials, other=other)
    return by_shape(matrix=chain(wide(inside), Aspect()), other=whole, above=rank)
