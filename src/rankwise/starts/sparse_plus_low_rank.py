"""A random sparse matrix on fixed places plus a low-rank one that begins as zero (SLTrain)."""

from dataclasses import dataclass

import torch
from torch import Generator

from ..core.methods import Start
from ..linalg import draw_places
from ..matrices import IndexedSparse, LowRank, Recomputed, Scaled, StructuredMatrix, Sum


@dataclass(frozen=True, kw_only=True)
class SparsePlusLowRankStart(Start):
    """Begin with W = alpha / r B A + V: B = 0, and V random and sparse on places that stay.

    A is uniform in +-1 / sqrt(n), as are the entries of V. At the start only V acts, and the outputs are
    sqrt(density) times as large as usual: models without normalisation layers need a larger V. Nothing of the
    size of W is kept between the passes (:class:`rankwise.matrices.Recomputed`).

    Args:
        rank: r, at most the smaller side of a layer.
        density: share of the entries of W that V has.
        alpha: scale of the low-rank term, times r.

    References: Han et al., "SLTrain: a sparse plus low-rank approach for parameter and memory efficient
        pretraining", NeurIPS 2024, arXiv 2406.02214; the defaults are those of its smallest model.
    """

    rank: int = 128
    density: float = 0.03
    alpha: float = 32.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be >= 1, got {self.rank}.")
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be > 0 and <= 1, got {self.density}.")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be a finite number > 0, got {self.alpha}.")

    def matrix(self, m: int, n: int, generator: Generator) -> StructuredMatrix:
        """Draw the places, then V, then A."""
        rank, bound = min(self.rank, m, n), n**-0.5
        places = draw_places(m * n, max(int(self.density * m * n), 1), generator)
        values = torch.empty(len(places)).uniform_(-bound, bound, generator=generator)
        right = torch.empty(rank, n).uniform_(-bound, bound, generator=generator)
        low_rank = Scaled(LowRank(torch.zeros(m, rank), right), self.alpha / rank)
        return Recomputed(Sum(low_rank, IndexedSparse.from_places(values, places, (m, n))))
