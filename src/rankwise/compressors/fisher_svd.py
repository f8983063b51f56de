"""Truncated SVD with the input features weighted by the Fisher information of their weights (FWSVD)."""

from dataclasses import dataclass
from typing import ClassVar

from ..core.statistics import GradientWeightedInput, Statistic, Stats
from ..linalg import Metric
from .quadratic import check_damping
from .truncation import TruncatedSvd


@dataclass(frozen=True, kw_only=True)
class FisherSvd(TruncatedSvd):
    """Keep the r directions that matter most for |(W - W_r) D|_F^2 with D_j^2 = E[|g|^2 x_j^2].

    D_j^2 is the diagonal Fisher information of the weights of input feature j, summed over the outputs: a row of
    the paper's W is an input feature, a column of a torch weight.

    Args:
        damping: multiple of mean(D^2) added to D^2, so that unused features do not divide by zero.
        gauge: how the result is stored: r rows or columns and how they make the others, or two factors.
        rank_multiple: offer only multiples of it, such as 16 or 32, for processors that prefer them.

    References: Hsu et al., "Language model compression with weighted low-rank factorization", ICLR 2022,
        arXiv 2207.00112. The gradients are per token; labels are the model's own or the data's, as chosen for
        the statistics (the paper: the data's).
    """

    damping: float = 1e-6
    needs: ClassVar[tuple[type[Statistic], ...]] = (GradientWeightedInput,)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damping("damping", self.damping)

    def metrics(self, stats: Stats) -> tuple[Metric, Metric]:
        """C = D^2: the error is |(W - W_r) D|_F^2."""
        return Metric(), Metric(stats[GradientWeightedInput].value(), self.damping)
