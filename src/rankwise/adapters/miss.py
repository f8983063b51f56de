"""One trained matrix, shared by all shards of the inputs (MiSS)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator

from ..core.methods import Ranked, check_count
from ..core.statistics import Stats
from ..matrices import Base, Branch, StructuredMatrix, Sum, Tiled
from ..matrices.base import TooSmallError


@dataclass(frozen=True, kw_only=True)
class Miss(Ranked):
    """Train D (m, r), from zero, in W + [D D ... D]: shards of r inputs are added, and D maps their sum.

    The same as :class:`Lora` with A = [I I ... I] frozen, B = D and scale 1, which leaves m r numbers to train.
    Unlike LoRA's, the gradient of all of them is there from the first step: that of W, summed over the shards.
    Where r does not divide n, the last shard is shorter. An update whose shards add up to zero cannot be
    learnt, so the order of the inputs matters.

    Names: this is what the second version of the paper (2025) calls Bone and the third MiSS, and it is PEFT's
    ``MISS`` with its default weights. The Bone of 2024 is :class:`Bat`; in a file, its numbers are 3-D and these
    are 2-D.

    In PEFT's layer a second adapter sees inputs that were filled up for the first one, and merging changes the
    base weight in place where r does not divide n; here W never changes.

    Args:
        rank: r; 64 is the published choice.
        mini: how many rows of D are trained; they are repeated down the m outputs, a multiple of it. None
            trains all.
        dropout: share of the branch's inputs that are dropped while training.
        ranks: from :mod:`rankwise.rank_rules`; None gives all layers the same.

    Learning rate: 2e-5, that of its authors' script for models of 2B; small models bear more.

    References: Kang et al., arXiv 2409.15371, titled "Bone" (2024), "DiSHA" and "MiSS: Matrix shard sharing"
        (2025) one after the other; ``mini`` is that of the code of PEFT.

    >>> import torch
    >>> from rankwise.matrices import Dense
    >>> adapted = Miss(rank=2).attach(Base(Dense(torch.eye(4))), {}, Generator())
    >>> sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    8
    """

    lr: ClassVar[float | None] = 2e-5
    rank: int = 64
    mini: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("rank", self.rank)
        if self.mini is not None:
            check_count("mini", self.mini)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be >= 0 and < 1, got {self.dropout!r}.")

    def attach(self, base: Base, stats: Stats, generator: Generator) -> StructuredMatrix:
        """Return W + [D D ... D] with D = 0."""
        m, n = base.shape
        rows = m if self.mini is None else self.mini
        if self.rank > n:
            raise TooSmallError(f"rank {self.rank} is larger than the {n} inputs; give a smaller one.")
        if m % rows:
            divisor = math.gcd(rows, m)
            raise ValueError(f"mini {rows} does not divide the {m} outputs; give a divisor, such as {divisor}.")
        wide = torch.promote_types(base.dtype, torch.float32)
        tile = torch.zeros(rows, self.rank, dtype=wide, device=base.device)
        return Sum(base, Branch(Tiled(tile, base.shape), dropout=self.dropout))
