"""A sum of Kronecker products beside a frozen weight: Compacter's matrices without its bottleneck."""

import math
from dataclasses import dataclass

import torch
from torch import Generator

from ..core.methods import Ranked
from ..core.statistics import Stats
from ..matrices import Base, Branch, Hypercomplex, StructuredMatrix, Sum
from ..matrices.base import TooSmallError
from ..matrices.hypercomplex import glorot


@dataclass(frozen=True, kw_only=True)
class KronLora(Ranked):
    """Train W + s sum_i A_i x (S_i T_i), x the Kronecker product, with k matrices A_i (k, k) and W frozen.

    The linear form of :class:`Compacter`: it folds into W. At the count of numbers of LoRA of the same rank r,
    and k^3 more, the change has rank up to k^2 r (:class:`~rankwise.matrices.Hypercomplex`). We know of no
    paper that has it; LoKr is near, with one product and without the sum. It starts at S = 0; A has variance
    1 / k, and T that of Glorot's rule, so gradients of S do not depend on k. Each layer has its own A_i, unlike
    Compacter's.

    Args:
        count: k, terms; it divides both sizes. 4 as Compacter's.
        rank: r, of the blocks S_i T_i.
        scale: s.
        dropout: share of the branch's inputs that are dropped while training.
        ranks: from :mod:`rankwise.rank_rules`; None gives all layers the same.

    Learning rate: none is published; the general one holds.

    References: Karimi Mahabadi, Henderson, Ruder, "Compacter", NeurIPS 2021, arXiv 2106.04647, for the matrices.

    >>> from rankwise.matrices import Dense
    >>> adapted = KronLora(count=2, rank=1).attach(Base(Dense(torch.eye(8))), {}, Generator())
    >>> sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    24
    """

    count: int = 4
    rank: int = 8
    scale: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("count", "rank"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be a positive number, got {self.scale!r}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be >= 0 and < 1, got {self.dropout!r}.")

    def largest(self, m: int, n: int) -> int:
        """The shorter side of a block.

        Raises:
            TooSmallError: if there are more terms than rows or columns.
            ValueError: if ``count`` does not divide both sizes.
        """
        k = self.count
        if k > min(m, n):
            raise TooSmallError(f"count {k} is larger than a side of ({m}, {n}); give a smaller one.")
        if m % k or n % k:
            raise ValueError(f"count {k} must divide both sizes of ({m}, {n}); change count.")
        return min(m, n) // k

    def attach(self, base: Base, stats: Stats, generator: Generator) -> StructuredMatrix:
        """Return W + s sum_i A_i x (S_i T_i)."""
        (m, n), k, r = base.shape, self.count, self.rank
        if r > self.largest(m, n):
            raise TooSmallError(f"blocks of ({m // k}, {n // k}) have no rank {r}; lower rank.")
        mixers = torch.randn(k, k, k, generator=generator) / math.sqrt(k)
        right = glorot(k, r, n // k, generator=generator)
        kind = {"device": base.device, "dtype": torch.promote_types(base.dtype, torch.float32)}
        update = Hypercomplex(mixers.to(**kind), torch.zeros(k, m // k, r, **kind), right.to(**kind))
        return Sum(base, Branch(update, self.scale, self.dropout))
