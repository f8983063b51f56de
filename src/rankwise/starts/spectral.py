"""A random matrix in its singular vectors, some of which train at a time (SST from scratch)."""

from dataclasses import dataclass

import torch
from torch import Generator

from ..core.methods import Start, check_count
from ..matrices import Scheduled, Spectral, StructuredMatrix
from ..schedules import SampledVectors
from ..schedules.sampled_vectors import SamplingSettings


@dataclass(frozen=True, kw_only=True)
class SpectralStart(Start, SamplingSettings):
    """Begin with W = U diag(s) V, the decomposition of the usual random weight; train s, and r pairs of vectors
    at a time.

    All directions of W have their turn, so that its rank is not bounded, where the optimiser holds numbers for
    r (m + n) + min(m, n) trained ones alone. But the factors hold more numbers than W does, twice as many where
    it is square, and a product costs as much more. :class:`~rankwise.matrices.Spectral` holds the gradients' rule
    and :class:`~rankwise.schedules.SampledVectors` draws the pairs: training needs :func:`rankwise.follow`, and
    ``Follower.finish()`` leaves an ordinary product of three factors. Do not decay the vectors, whose lengths are
    put back to one, and keep the model in float32: bfloat16 loses their small steps.

    Args:
        rank: r, at most the smaller side of a layer.
        hold: it and all others are the fields of :class:`~rankwise.schedules.SampledVectors`.

    References: Zhao et al., "Sparse spectral training", ICML 2025, arXiv 2405.15481, whose smallest model has
        rank 64; see :class:`~rankwise.schedules.SampledVectors` for what is not verified.
    """

    rank: int = 64

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        _ = self.schedule  # it checks the others

    @property
    def schedule(self) -> SampledVectors:
        """What draws the vectors."""
        return SampledVectors.of(self)

    def matrix(self, m: int, n: int, generator: Generator) -> StructuredMatrix:
        """Draw W uniform in +-1 / sqrt(n), as torch does, decompose it, and draw the first pairs."""
        bound = n**-0.5
        weight = torch.empty(m, n).uniform_(-bound, bound, generator=generator)
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        chosen = self.schedule.draw(s, min(self.rank, m, n), generator)
        return Scheduled(Spectral(u.contiguous(), s, vt.contiguous(), chosen), self.schedule.data())
