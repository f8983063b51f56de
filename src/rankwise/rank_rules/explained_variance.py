"""Ranks go where few directions explain much of the inputs (EVA)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.methods import RankRule, check_most
from ..core.statistics import InputGram, InputMean, Statistic, Stats
from ..linalg import principal_components
from ..matrices import StructuredMatrix


@dataclass(frozen=True, kw_only=True)
class ExplainedVariance(RankRule):
    """A rank is worth the share of the variance of a layer's inputs that its component explains.

    Args:
        most: the largest rank of a layer, as a multiple of the average; 1 gives all layers the same.
        centred: take the mean of the inputs off.

    References: Paischer et al., "Parameter efficient fine-tuning via explained variance adaptation", 2024,
        arXiv 2410.07170.
    """

    most: float = 2.0
    centred: bool = True

    def __post_init__(self) -> None:
        check_most(self.most)

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        """The second moment of the inputs, and their mean where it is taken off."""
        return (InputGram, InputMean) if self.centred else (InputGram,)

    def missed(self, base: StructuredMatrix, stats: Stats, count: int) -> Tensor:
        """Return the shares of the variance that are left."""
        mean = stats[InputMean].value() if self.centred else None
        variances, _ = principal_components(stats[InputGram].value(), mean)
        shares = (variances / variances.sum())[:count].cumsum(0)
        return torch.cat([torch.ones_like(shares[:1]), 1 - shares]).clamp_min(0)
