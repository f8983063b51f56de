"""Ranks go where the leading singular vectors hold little of a weight (LaMDA++)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.methods import RankRule, check_most
from ..core.statistics import Stats
from ..matrices import StructuredMatrix


@dataclass(frozen=True, kw_only=True)
class SpectralEnergy(RankRule):
    """Rank r is worth log E(r), with E(r) the share of the squared singular values of W that the r largest have.

    So layers of a flat spectrum get more ranks, and those whose first directions hold most get fewer. What the
    ranks maximise is the sum of log E over the layers: a rank is worth the share by which it makes E grow. The
    sum of E itself would not do: of many equal directions each holds little, so that a flat layer would get no
    rank.

    This is a reconstruction: the paper scores layers by E at the target rank, and gives those with less of it
    more rank, out of a few allowed ones; its exact rule was not checked, and the published code has none of it.
    No data is needed.

    Args:
        most: the largest rank of a layer, as a multiple of the average; 1 gives all layers the same.

    References: Azizi, Kundu, Pedram, "LaMDA: Large model fine-tuning via spectrally decomposed low-dimensional
        adaptation", Findings of EMNLP 2024, arXiv 2406.12832.
    """

    most: float = 2.0

    def __post_init__(self) -> None:
        check_most(self.most)

    def missed(self, base: StructuredMatrix, stats: Stats, count: int) -> Tensor:
        """Return -log E; that of rank 0 stands for infinity, so that all layers get one before any gets two."""
        squares = torch.linalg.svdvals(base.dense().detach().double()).square()
        if not bool(squares[0] > 0):
            raise ValueError("the weight is zero, so it has no spectrum.")
        energy = torch.cat([torch.zeros_like(squares[:1]), (squares / squares.sum()).cumsum(0)])
        return -energy[: count + 1].clamp(torch.finfo(energy.dtype).tiny, 1).log()
