"""Truncated SVD of the weight itself."""

from dataclasses import dataclass

from ..core.statistics import Stats
from ..linalg import Metric
from .truncation import TruncatedSvd


@dataclass(frozen=True, kw_only=True)
class PlainSvd(TruncatedSvd):
    """Keep the r directions of W that matter most for |W - W_r|_F^2; needs no data.

    Args:
        gauge: how the result is stored: r rows or columns and how they make the others, or two factors.
        rank_multiple: offer only multiples of it, such as 16 or 32, for processors that prefer them.

    References: Eckart and Young, "The approximation of one matrix by another of lower rank", 1936.
    """

    def metrics(self, stats: Stats) -> tuple[Metric, Metric]:
        """No metric: the error is |W - W_r|_F^2."""
        return Metric(), Metric()
