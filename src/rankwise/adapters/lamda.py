"""A small square core between singular vectors, of which the left ones train for a while (LaMDA)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator

from ..core.methods import Ranked
from ..core.statistics import Stats
from ..initialisers import SingularVectors
from ..matrices import Base, Branch, Dense, Diagonal, Frozen, Product, Scaled, Scheduled, StructuredMatrix, Sum
from ..matrices.base import check_rank
from ..schedules import FreezeColumns
from ..schedules.freeze_columns import FreezeSettings
from .lora import Lora


@dataclass(frozen=True, kw_only=True)
class Lamda(Ranked, FreezeSettings):
    """Train the core D (r, r), and at first B (m, r), in W + s B (S + D) A - s U S A with W frozen.

    A (r, n) holds the r leading right singular vectors of W and never trains; B starts at the left ones, U; s S
    are the singular values. D starts at zero, so that weight decay draws the core towards S and not to zero.
    :class:`~rankwise.schedules.FreezeColumns` freezes B: training needs :func:`rankwise.follow`. In the end r^2
    numbers train. Of the inputs of a layer only r numbers each are kept for the backward pass, not n.

    Args:
        rank: r.
        alpha: s = alpha / rank; None means s = 1. Since s S are the singular values whatever s is, it only says
            how much D counts. The authors' 16 at rank 64 is for a core that starts at random.
        dropout: share of the branch's inputs that are dropped while training; as in :class:`Lora` none, where the
            authors' script drops 0.1.
        until: B trains less and less, and no more after this share of the steps, in (0, 1].
        ranks: from :mod:`rankwise.rank_rules`; None gives all layers the same, and SpectralEnergy() is LaMDA++.

    Learning rate: 3e-4, that of its authors' script for LLaMA-2 7B on WikiText-2.

    References: Azizi, Kundu, Pedram, "LaMDA", Findings of EMNLP 2024, arXiv 2406.12832. That the core starts at
        the singular values was not checked against the paper, and the released code has no spectral start at all.
    """

    lr: ClassVar[float | None] = 3e-4
    rank: int = 32
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self._lora, self.schedule  # they check the fields

    @property
    def _lora(self) -> Lora:
        return Lora(rank=self.rank, alpha=self.alpha, dropout=self.dropout)

    @property
    def schedule(self) -> FreezeColumns:
        """What freezes B."""
        return FreezeColumns.of(self)

    def attach(self, base: Base, stats: Stats, generator: Generator) -> StructuredMatrix:
        """Return W + s (B (S + D) - U S) A."""
        check_rank(self.rank, *base.shape)
        scale = self._lora.scale
        left, values, right = SingularVectors().decomposed(base, self.rank, generator)
        values = values / scale
        core = Sum(Frozen(Diagonal(values)), Dense(values.new_zeros(self.rank, self.rank)))
        trained = Product(Scheduled(Dense(left), self.schedule.data()), core)
        start = Frozen(Product(Dense(left.clone()), Diagonal(values.clone())))
        moved = Product(Sum(trained, Scaled(start, -1.0)), Frozen(Dense(right)))
        return Sum(base, Branch(moved, scale, self.dropout))
