"""Truncated SVD with the input features weighted by the Fisher information of their weights (FWSVD)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.choices import Choices
from ..core.methods import Compressor
from ..core.statistics import GradientWeightedInput, Statistic, Stats
from ..linalg import Metric
from .truncation import Gauge, check_damping, check_gauge, truncations


@dataclass(frozen=True, kw_only=True)
class FisherSvd(Compressor):
    """Keep the r directions that matter most for |(W - W_r) D|_F^2 with D_j^2 = E[|g|^2 x_j^2].

    D_j^2 is the diagonal Fisher information of the weights of input feature j, summed over the outputs: a row of
    the paper's W is an input feature, a column of a torch weight.

    Args:
        damping: multiple of mean(D^2) added to D^2, so that unused features do not divide by zero.
        gauge: how the result is stored: r rows and the others as combinations of them, or two factors.

    References: Hsu et al., "Language model compression with weighted low-rank factorization", ICLR 2022,
        arXiv 2207.00112. The gradients are per token; labels are the model's own or the data's, as chosen for
        the statistics (the paper: the data's).
    """

    damping: float = 1e-6
    gauge: Gauge = "pivot"
    needs: ClassVar[tuple[type[Statistic], ...]] = (GradientWeightedInput,)

    def __post_init__(self) -> None:
        check_gauge(self.gauge)
        check_damping("damping", self.damping)

    def choices(self, weight: Tensor, stats: Stats) -> Choices:
        """Offer every rank; the error is |(W - W_r) D|_F^2."""

        def metrics() -> tuple[Metric, Metric]:
            return Metric(), Metric(stats[GradientWeightedInput].value(), self.damping)

        return truncations(weight, metrics, self.gauge)
