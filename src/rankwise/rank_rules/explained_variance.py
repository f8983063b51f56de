"""Ranks go where few directions explain much of the inputs (EVA)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.components import input_components, needed
from ..core.methods import RankRule, check_most
from ..core.statistics import Statistic, Stats
from ..matrices import StructuredMatrix


@dataclass(frozen=True, kw_only=True)
class ExplainedVariance(RankRule):
    """A rank is worth the share of the variance of a layer's inputs that its component explains.

    A component that explains nothing gets no rank: where all layers' inputs have fewer components than there are
    ranks, the published code gives the rest to directions that no input has, and here they are left over.

    Args:
        most: the largest rank of a layer, as a multiple of the average; 1 gives all layers the same.
        centred: take the mean of the inputs off.
        answers: as in :class:`~rankwise.initialisers.PrincipalInputs`.

    References: Paischer et al., "Parameter efficient fine-tuning via explained variance adaptation", 2024,
        arXiv 2410.07170.
    """

    most: float = 2.0
    centred: bool = True
    answers: bool = True

    def __post_init__(self) -> None:
        check_most(self.most)

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        """The second moment of the inputs, and their mean where it is taken off."""
        return needed(self.centred, self.answers)

    def missed(self, base: StructuredMatrix, stats: Stats, count: int) -> Tensor:
        """Return the shares of the variance that are left."""
        variances, _ = input_components(stats, self.needs)
        shares = (variances / variances.sum())[:count].cumsum(0)
        return torch.cat([torch.ones_like(shares[:1]), 1 - shares]).clamp_min(0)
