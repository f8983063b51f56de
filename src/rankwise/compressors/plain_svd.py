"""Truncated SVD of the weight itself."""

from dataclasses import dataclass

from torch import Tensor

from ..core.choices import Choices
from ..core.methods import Compressor
from ..core.statistics import Stats
from ..linalg import Metric
from .truncation import Gauge, check_gauge, truncations


@dataclass(frozen=True, kw_only=True)
class PlainSvd(Compressor):
    """Keep the r directions of W that matter most for |W - W_r|_F^2; needs no data.

    Args:
        gauge: how the result is stored: r rows and the others as combinations of them, or two factors.

    References: Eckart and Young, "The approximation of one matrix by another of lower rank", 1936.
    """

    gauge: Gauge = "pivot"

    def __post_init__(self) -> None:
        check_gauge(self.gauge)

    def choices(self, weight: Tensor, stats: Stats) -> Choices:
        """Offer every rank; the error is |W - W_r|_F^2."""
        return truncations(weight, lambda: (Metric(), Metric()), self.gauge)
