"""Training in the singular vectors of a weight, some at a time (SST)."""

from dataclasses import dataclass

from torch import Generator

from ..core.methods import Ranked
from ..core.statistics import Stats
from ..initialisers import SingularVectors
from ..matrices import (
    Base,
    Branch,
    Dense,
    Diagonal,
    Frozen,
    Product,
    Scaled,
    Scheduled,
    Spectral,
    StructuredMatrix,
    Sum,
)
from ..matrices.base import check_rank
from ..schedules import SampledVectors
from ..schedules.sampled_vectors import SamplingSettings
from .lora import Lora


@dataclass(frozen=True, kw_only=True)
class Sst(Ranked, SamplingSettings):
    """Train all values s, and r pairs of vectors at a time, in W + U diag(s) V - U0 diag(s0) V0 with W frozen.

    It starts at the singular value decomposition of W, or the leading part of it.
    :class:`~rankwise.matrices.Spectral` holds the gradients' rule and :class:`~rankwise.schedules.SampledVectors`
    draws the pairs: training needs :func:`rankwise.follow`. The optimiser keeps numbers for r pairs alone, but W
    and the start stay in memory: the paper replaces weights to train from scratch, and its memory is not this
    one's.

    Args:
        rank: r, how many pairs of vectors train at a time.
        components: how many pairs there are; None means as many as the shorter side of W.
        ranks: from :mod:`rankwise.rank_rules`; None gives all layers the same.
        hold: it and all others are the fields of :class:`~rankwise.schedules.SampledVectors`.

    Learning rate: the published ones are for training from scratch; here the general one holds.

    References: Zhao et al., "Sparse spectral training", ICML 2025, arXiv 2405.15481; see there for what is not
        verified.
    """

    rank: int = 8
    components: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = Lora(rank=self.rank), self.schedule  # they check the fields
        if self.components is not None and self.components < self.rank:
            raise ValueError(f"components must be >= rank {self.rank} or None, got {self.components}.")

    @property
    def schedule(self) -> SampledVectors:
        """What draws the vectors."""
        return SampledVectors.of(self)

    def largest(self, m: int, n: int) -> int:
        """How many pairs there are.

        Raises:
            TooSmallError: if a matrix of this shape has not so many.
        """
        count = self.components or min(m, n)
        check_rank(count, m, n)
        return count

    def attach(self, base: Base, stats: Stats, generator: Generator) -> StructuredMatrix:
        """Return W + U diag(s) V - U0 diag(s0) V0."""
        count = self.largest(*base.shape)
        check_rank(self.rank, *base.shape)
        left, values, right = SingularVectors().decomposed(base, count, generator)
        start = Product(Dense(left.clone()), Diagonal(values.clone()), Dense(right.clone()))
        drawn = self.schedule.draw(values, self.rank, generator)
        trained = Spectral(left, values.clone(), right, drawn.to(left.device))
        return Sum(base, Branch(Sum(Scheduled(trained, self.schedule.data()), Scaled(Frozen(start), -1.0))))
