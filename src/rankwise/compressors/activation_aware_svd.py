"""Truncated SVD with the input features scaled by their typical size (ASVD)."""

from dataclasses import dataclass
from typing import ClassVar

from ..core.statistics import InputMagnitude, Statistic, Stats
from ..linalg import Metric
from .quadratic import check_damping
from .truncation import TruncatedSvd


@dataclass(frozen=True, kw_only=True)
class ActivationAwareSvd(TruncatedSvd):
    """Keep the r directions that matter most for |(W - W_r) D|_F^2 with D = diag(E|x|^alpha).

    Args:
        alpha: how much the size of an input feature counts; 0 is the plain SVD. The paper's default.
        floor: added to D, so that unused features do not divide by zero. The value of the paper's code.
        gauge: how the result is stored: r rows or columns and how they make the others, or two factors.
        rank_multiple: offer only multiples of it, such as 16 or 32, for processors that prefer them.

    References: Yuan et al., "ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language
        Models", 2023, arXiv 2312.05821. The truncation is the paper's; its search for ranks by the perplexity
        of single compressed layers is not included.
    """

    alpha: float = 0.5
    floor: float = 1e-6
    needs: ClassVar[tuple[type[Statistic], ...]] = (InputMagnitude,)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damping("alpha", self.alpha)
        if not 0 < self.floor < float("inf"):
            raise ValueError(f"floor must be a finite number > 0, got {self.floor}.")

    def metrics(self, stats: Stats) -> tuple[Metric, Metric]:
        """C = D^2: the error is |(W - W_r) D|_F^2."""
        scale = stats[InputMagnitude].value() ** self.alpha + self.floor  # (n,)
        return Metric(), Metric(scale.square())
