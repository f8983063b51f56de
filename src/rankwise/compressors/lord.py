"""Principal components of the layer outputs, their mean kept in the bias (LoRD)."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.choices import Choices
from ..core.statistics import InputGram, InputMean, Statistic, Stats
from ..linalg import Metric
from .quadratic import check_damping
from .truncation import TruncatedSvd


@dataclass(frozen=True, kw_only=True)
class Lord(TruncatedSvd):
    """Keep the r principal components of the outputs W x, and their mean exactly.

    The error is the variance of the outputs that is lost, tr(D K D') with K = E[x x'] - E[x] E[x]'. What a
    change D of the weight does to the mean, D E[x], goes into the bias; a layer without one gets one, and its
    numbers count. A model that got biases is saved before it is folded, since its architecture may have no place
    for them.

    Args:
        damping: multiple of mean(diag K) added to K's diagonal, so that a large mean does not damp. Sums in
            float32 lose 1e-7 of E[x x']: where means are hundreds of standard deviations, K is not exact.
        gauge: how the result is stored: r rows or columns and how they make the others, or two factors.
        rank_multiple: offer only multiples of it, such as 16 or 32, for processors that prefer them.

    References: Kaushal, Vaidhya, Rish, "LORD: Low rank decomposition of monolingual code LLMs for one-shot
        compression", 2023, arXiv 2309.14021; Yu and Wu, "Compressing transformers: features are low-rank, but
        weights are not", AAAI 2023. Without centring this is :class:`WhitenedSvd`.
    """

    damping: float = 1e-6
    needs: ClassVar[tuple[type[Statistic], ...]] = (InputGram, InputMean)
    shifts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damping("damping", self.damping)

    def metrics(self, stats: Stats) -> tuple[Metric, Metric]:
        """K alone; what rounding makes negative counts as zero."""
        moment, mean = stats[InputGram].value(), stats[InputMean].value()
        covariance = moment - mean.outer(mean)
        energies, vectors = torch.linalg.eigh(covariance)
        rounding = torch.finfo(torch.float32).eps * moment.diagonal().mean()  # all that is left of equal inputs
        energies = energies.clamp_min(0) + self.damping * covariance.diagonal().mean().clamp_min(rounding)
        return Metric(), Metric(vectors * energies @ vectors.mT)

    def choices(self, weight: Tensor, stats: Stats) -> Choices:
        """Offer the ranks of an (m, n) weight."""
        return dataclasses.replace(super().choices(weight, stats), mean=stats[InputMean].value())
