"""A low-rank update whose ranks are chosen while it trains (AdaLoRA)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator

from ..core.methods import Adapter
from ..core.statistics import Stats
from ..matrices import Base, Branch, Dense, Diagonal, Product, Scheduled, StructuredMatrix, Sum
from ..matrices.base import check_rank
from ..schedules import TripletBudget
from ..schedules.triplet_budget import TripletSettings
from .lora import Lora

SPREAD = 0.02  # standard deviation of P and Q, that of the published code


@dataclass(frozen=True, kw_only=True)
class AdaLora(Adapter, TripletSettings):
    """Train P (m, r), e (r,) and Q (r, n) in W + s P diag(e) Q; only the best triplets of all layers stay.

    It begins with e = 0 and random P and Q. :class:`~rankwise.schedules.TripletBudget` chooses the triplets:
    training needs :func:`rankwise.follow`. What ``Follower.finish()`` leaves holds the chosen ones alone, and a
    layer may end with none.

    Args:
        rank: of each layer at first.
        alpha: s = alpha / rank; None means s = 1. Published defaults make s small, and training slow.
        dropout: share of the branch's inputs that are dropped while training.
        target: average rank in the end, at most ``rank``; it and all others are the fields of
            :class:`~rankwise.schedules.TripletBudget`.

    Learning rate: 5e-4, that of its authors' script for DeBERTa-v3-base on MNLI; on smaller tasks they take up
    to 2.2e-3.

    References: Zhang et al., "Adaptive budget allocation for parameter-efficient fine-tuning", ICLR 2023,
        arXiv 2303.10512.
    """

    lr: ClassVar[float | None] = 5e-4
    rank: int = 12
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _ = self._lora, self.schedule  # they check the fields
        if self.target > self.rank:
            raise ValueError(f"target must be <= rank {self.rank}, with which layers begin; got {self.target}.")

    @property
    def _lora(self) -> Lora:
        return Lora(rank=self.rank, alpha=self.alpha, dropout=self.dropout)

    @property
    def schedule(self) -> TripletBudget:
        """What chooses the triplets."""
        return TripletBudget.of(self)

    def attach(self, base: Base, stats: Stats, generator: Generator) -> StructuredMatrix:
        """Return W + s P diag(e) Q."""
        m, n = base.shape
        check_rank(self.rank, m, n)
        wide = torch.promote_types(base.dtype, torch.float32)
        left, right = (
            (SPREAD * torch.randn(*sizes, generator=generator)).to(base.device, wide)
            for sizes in ((m, self.rank), (self.rank, n))
        )
        values = torch.zeros(self.rank, device=base.device, dtype=wide)
        triplets = Scheduled(Product(Dense(left), Diagonal(values), Dense(right)), self.schedule.data())
        return Sum(base, Branch(triplets, self._lora.scale, self.dropout))
