"""Truncated SVD with the input features scaled by their typical size (ASVD)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.choices import Choices
from ..core.methods import Compressor
from ..core.statistics import InputMagnitude, Statistic, Stats
from ..linalg import Metric
from .truncation import Gauge, check_damping, check_gauge, truncations


@dataclass(frozen=True, kw_only=True)
class ActivationAwareSvd(Compressor):
    """Keep the r directions that matter most for |(W - W_r) D|_F^2 with D = diag(E|x|^alpha).

    Args:
        alpha: how much the size of an input feature counts; 0 is the plain SVD. The paper's default.
        floor: added to D, so that unused features do not divide by zero. The value of the paper's code.
        gauge: how the result is stored: r rows and the others as combinations of them, or two factors.

    References: Yuan et al., "ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language
        Models", 2023, arXiv 2312.05821. The truncation is the paper's; its search for ranks by the perplexity
        of single compressed layers is not included.
    """

    alpha: float = 0.5
    floor: float = 1e-6
    gauge: Gauge = "pivot"
    needs: ClassVar[tuple[type[Statistic], ...]] = (InputMagnitude,)

    def __post_init__(self) -> None:
        check_gauge(self.gauge)
        check_damping("alpha", self.alpha)
        if not 0 < self.floor < float("inf"):
            raise ValueError(f"floor must be a finite number > 0, got {self.floor}.")

    def choices(self, weight: Tensor, stats: Stats) -> Choices:
        """Offer every rank; the error is |(W - W_r) D|_F^2."""
        scale = stats[InputMagnitude].value() ** self.alpha + self.floor  # (n,)
        return truncations(weight, lambda: (Metric(), Metric(scale.square())), self.gauge)
