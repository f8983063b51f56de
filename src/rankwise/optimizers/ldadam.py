"""Adam in a subspace that changes at each step, which forgets nothing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.combining import by_shape
from ..core.directions import Direction, add_to, formed
from ..core.seen import wide
from ..core.states import State, per_parameter
from ..core.subspaces import Projector, Refresh, Subspace
from ..core.transforms import Transform
from ..projectors import Every, Rotate, WarmPower
from .adam import Adam
from .project import begin


@dataclass(frozen=True, kw_only=True)
class LowDimensionalAdam(Transform):
    """Adam in a subspace fitted to its own mean, with what the subspace loses added to the next gradient.

    With M the mean brought back to (k, s, l), A = G + E the gradient with the error, the basis is fitted to
    rho M / (1 - b1^t) + (1 - rho) A. Then E <- A - P P'A + b1 / (1 - b1) (M - P P'M), which makes the mean that
    of the whole space, but for the last error: M_t = b1 M_{t-1} + (1 - b1) (G + E_{t-1} - E_t).

    Args:
        subspace: where Adam works; its rule of carrying should rotate.
        adam: what works.
        rho: how far the basis follows the mean instead of the gradient.
        feedback: keep the error; else it is dropped.
    """

    subspace: Subspace
    adam: Adam
    rho: float
    feedback: bool

    def __post_init__(self) -> None:
        if not 0 <= self.rho < 1:
            raise ValueError(f"rho must be from 0 to below 1, got {self.rho}.")

    def init(self, param: Tensor, index: Tensor) -> State:
        """The states of the parts, and the error."""
        error = {"error": torch.zeros_like(param)} if self.feedback else {}
        return {**begin(self.subspace, self.adam, param, index), **error}

    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """(k, s, l) -> (k, s, l)."""
        return formed(self.update_unformed(grad, state, param))

    def update_unformed(self, grad: Tensor, state: State, param: Tensor) -> Direction:
        """(k, s, l) -> (k, s, l), a product."""
        projector, basis, inside = self.subspace.projector, state["subspace"]["basis"], state["inner"]
        if self.feedback:
            grad = grad + state["error"]
        b1 = self.adam.betas[0]
        mean = projector.up(inside["mean"], basis)
        short = [1 - b1**step for step in inside["step"].clamp_min(1).tolist()]
        target = torch.lerp(grad, mean / per_parameter(short, mean), self.rho)
        self.subspace.follow(target, state["subspace"], self.adam, inside)
        low = projector.down(grad, basis)
        if self.feedback:
            lost = add_to(mean, projector.lift(inside["mean"], basis), factor=-1)
            error = add_to(state["error"].copy_(grad), projector.lift(low, basis), factor=-1)
            error.add_(lost, alpha=b1 / (1 - b1))
        return projector.lift(self.adam.update(low, inside, torch.empty_like(low, device="meta")), basis)


def ldadam(
    *,
    rank: int | float,
    every: int | Refresh = 1,
    betas: tuple[float, float] = (0.908, 0.99),
    eps: float = 1e-8,
    rho: float = 0.908,
    feedback: bool = True,
    projector: Projector = WarmPower(fresh=0),  # noqa: B008 (frozen)
) -> Transform:
    """LDAdam: Adam in a low-rank subspace that moves at each step, with moments that move along.

    Means are rotated, squares are carried as variances, and what lies outside the subspace is kept for the next
    step, so that no part of a gradient is lost.

    >>> ldadam(rank=4).matrix.inner.subspace.refresh
    Every(steps=1, together=False)

    Args:
        rank: of the subspace, or its share of the shorter side. Matrices with no longer side get Adam.
        every: steps between two changes of the subspace, or a rule.
        betas: of Adam.
        eps: of Adam.
        rho: how far the subspace follows the mean instead of the gradient.
        feedback: keep what is lost, in float32. It takes a number for each entry of the matrix; in the published
            code it lies in ``.grad``, where clipping and logging meet it and what is saved misses it.
        projector: makes the subspace go on; without ``feedback``, ``WarmPower()`` lets it also leave what the
            first gradients spanned.

    References: Robert et al., ICLR 2025, arXiv 2410.16103. There the first basis is that of an SVD, here of power
    steps from random vectors (``projector=Svd()`` computes one at each change), and negative variances turn their
    sign, here they are zero.
    """
    refresh = every if isinstance(every, Refresh) else Every(every)
    subspace = Subspace(projector=projector, rank=rank, refresh=refresh, carry=Rotate())
    adam = Adam(betas=betas, eps=eps)
    inside = LowDimensionalAdam(subspace=subspace, adam=adam, rho=rho, feedback=feedback)
    return by_shape(matrix=wide(inside), other=adam, above=rank)
