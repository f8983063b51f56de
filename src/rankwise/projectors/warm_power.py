"""Singular vectors by power steps that go on from the last ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.methods import check_count
from ..core.states import State
from ..linalg import draw_normal, power_steps
from .bases import StoredBasis


@dataclass(frozen=True, kw_only=True)
class WarmPower(StoredBasis):
    """Improve the last basis Q by block power steps, Q <- qr(G G' Q): two products and a QR of r columns.

    Gradients change slowly, so one step from the last basis finds about what an SVD finds. The sign and order of
    columns go on too, so that moments keep their meaning. But where a later gradient is orthogonal to the basis,
    as one of other units is, a power step does not find it: so a few random columns are stepped beside the basis,
    and each takes the place of a column that holds less of the gradient.

    Args:
        steps: at each fit.
        start: steps of the first fit, from random vectors.
        fresh: random columns of each later fit, at most r; with 0 the basis never leaves what the first gradients
            spanned, unless something outside of it is kept and comes back, as LDAdam's errors do.

    References: Halko, Martinsson, Tropp, "Finding structure with randomness", 2011, arXiv 0909.4061; the warm
    start is that of PowerSGD (Vogels et al. 2019, arXiv 1905.13727) and LDAdam (Robert et al. 2024,
    arXiv 2410.16103).
    """

    steps: int = 1
    start: int = 2
    fresh: int = 4

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_count("start", self.start)
        if self.fresh < 0:
            raise ValueError(f"fresh must be >= 0, got {self.fresh}.")

    def fit(self, grad: Tensor, state: State, *, first: bool) -> State:
        """Go on from the last basis, or from random vectors."""
        basis = state["columns"]
        side, rank = basis.shape[-2:]
        if first:
            start = draw_normal((side, rank), state["index"], grad)
            return {**state, "columns": power_steps(grad, start, self.start)}
        fresh = min(self.fresh, rank, side - rank)
        if not fresh:
            return {**state, "columns": power_steps(grad, basis, self.steps)}
        beside = draw_normal((side, fresh), state["index"], grad)
        wider = power_steps(grad, torch.cat([basis, beside], dim=-1), self.steps)
        return {**state, "columns": _exchanged(grad, wider, fresh)}


def _exchanged(grad: Tensor, basis: Tensor, fresh: int) -> Tensor:
    """Return the r columns of (k, s, r + fresh) that hold most, the last ones in places of the first."""
    held = (basis.mT @ grad).square().sum(-1)
    last = held[:, -fresh:].argsort(descending=True) + held.shape[-1] - fresh
    weak = held[:, :-fresh].argsort()[:, :fresh]
    better = held.gather(-1, last) > held.gather(-1, weak)
    places = torch.arange(held.shape[-1] - fresh, device=held.device).repeat(len(held), 1)
    places.scatter_(-1, weak, torch.where(better, last, weak))
    return basis.gather(-1, places[:, None].expand(-1, basis.shape[-2], -1))
