"""Singular vectors by power steps that go on from the last ones."""

from dataclasses import dataclass

from torch import Tensor

from ..core.methods import check_count
from ..core.states import State
from ..linalg import draw_normal, power_steps
from .bases import StoredBasis


@dataclass(frozen=True, kw_only=True)
class WarmPower(StoredBasis):
    """Improve the last basis Q by block power steps, Q <- qr(G G' Q): two products and a QR of r columns.

    Gradients change slowly, so one step from the last basis finds about what an SVD finds. The sign and order of
    columns go on too, so that moments keep their meaning.

    Args:
        steps: at each fit.
        start: steps of the first fit, from random vectors.

    References: Halko, Martinsson, Tropp, "Finding structure with randomness", 2011, arXiv 0909.4061; the warm
    start is that of PowerSGD (Vogels et al. 2019, arXiv 1905.13727) and LDAdam (Robert et al. 2024,
    arXiv 2410.16103).
    """

    steps: int = 1
    start: int = 2

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_count("start", self.start)

    def fit(self, grad: Tensor, state: State, *, first: bool) -> State:
        """Go on from the last basis, or from random vectors."""
        basis, steps = state["columns"], self.steps
        if first:
            basis, steps = draw_normal(tuple(basis.shape[1:]), state["index"], grad), self.start
        return {**state, "columns": power_steps(grad, basis, steps)}
