"""A low-rank update beside a frozen weight (LoRA), also with rows of trained lengths (DoRA)."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Generator

from ..core.methods import Initialiser, Ranked, check_count
from ..core.statistics import Statistic, Stats
from ..initialisers import Uniform
from ..matrices import Base, Branch, Frozen, LowRank, RowNormalised, Scaled, StructuredMatrix, Sum
from ..matrices.base import check_rank


@dataclass(frozen=True, kw_only=True)
class Lora(Ranked):
    """Train B (m, r) and A (r, n) in W + s B A with W frozen.

    A start that is not zero is subtracted again, as a frozen term: W itself never changes. The factors are
    float32 where W is in half precision.

    Args:
        rank: r, or the average of the layers' where ``ranks`` is given.
        alpha: s = alpha / rank; None means s = 1. A layer whose rank is not ``rank`` keeps the same s.
        rank_stabilised: s = alpha / sqrt(rank) (rsLoRA).
        magnitudes: also train the lengths of the rows of W + s B A (DoRA).
        dropout: share of the branch's inputs that are dropped while training.
        start: from :mod:`rankwise.initialisers`.
        ranks: from :mod:`rankwise.rank_rules`; None gives all layers the same.

    Learning rate: 5e-4, that of its authors' script for RoBERTa-base on MNLI; 1e-4 to 5e-4 are usual.

    References: Hu et al., "LoRA", ICLR 2022, arXiv 2106.09685; Kalajdzievski, "A rank stabilization scaling
        factor for fine-tuning with LoRA", 2023, arXiv 2312.03732; Liu et al., "DoRA", ICML 2024,
        arXiv 2402.09353.

    >>> import torch
    >>> from rankwise.matrices import Dense
    >>> adapted = Lora(rank=2).attach(Base(Dense(torch.eye(4))), {}, Generator())
    >>> sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    16
    """

    lr: ClassVar[float | None] = 5e-4
    rank: int = 8
    alpha: float | None = None
    rank_stabilised: bool = False
    magnitudes: bool = False
    dropout: float = 0.0
    start: Initialiser = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("rank", self.rank)
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be a positive number, got {self.alpha!r}.")
        if self.rank_stabilised and self.alpha is None:
            raise ValueError("rank_stabilised changes how alpha counts; give alpha.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be >= 0 and < 1, got {self.dropout!r}.")
        if not isinstance(self.start, Initialiser):
            raise TypeError(f"start must be an object from rankwise.initialisers, got {self.start!r}.")

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        """What the start reads."""
        return self.start.needs

    @property
    def scale(self) -> float:
        """What B A counts."""
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def largest(self, m: int, n: int) -> int:
        """That of the start."""
        return self.start.largest(m, n)

    def attach(self, base: Base, stats: Stats, generator: Generator) -> StructuredMatrix:
        """Return W + s B A, or the same with rows of trained lengths."""
        branch = self.branch(base, stats, generator)
        return RowNormalised.of(base, branch) if self.magnitudes else Sum(base, branch)

    def branch(self, base: Base, stats: Stats, generator: Generator) -> Branch:
        """Return s B A, less its start where that is not zero."""
        check_rank(self.rank, *base.shape)
        factors = self.start.factors(base, self.rank, self.scale, stats, generator)
        wide = torch.promote_types(base.dtype, torch.float32)
        moves = all(bool(factor.any()) for factor in factors)  # the weight
        left, right = (factor.to(base.device, wide) for factor in factors)
        update: StructuredMatrix = LowRank(left, right)
        if moves:
            update = Sum(update, Scaled(Frozen(LowRank(left.clone(), right.clone())), -1.0))
        return Branch(update, self.scale, self.dropout)

    def with_rank(self, rank: int) -> Self:
        """The same with another rank and the same scale."""
        alpha = self.scale * (math.sqrt(rank) if self.rank_stabilised else rank)
        return dataclasses.replace(self, rank=rank, alpha=alpha)
