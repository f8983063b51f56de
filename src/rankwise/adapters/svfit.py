"""Trained singular values (SVFit)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from ..core.methods import Ranked, check_count
from ..core.statistics import Stats
from ..matrices import Base, StructuredMatrix
from ..matrices.base import TooSmallError
from .diagonal_core import diagonal_core, written_out


@dataclass(frozen=True, kw_only=True)
class Svfit(Ranked):
    """Train d (r,), from zero, in W + U diag(d) V', with U and V the leading singular vectors of W.

    The singular values are then sigma + d: d is their change, so that weight decay pulls to the weight as it was,
    where on sigma itself it would shrink it, and a small step does not vanish beside a large sigma. The change
    is an exact LoRA of rank r. Directions can be rescaled, never turned: what a target has outside the dyads
    u_i v_i' is out of reach.

    As the paper words it, W is split into its leading part and a residual; here W stays whole, which computes the
    same. U and V' cost r (m + n) frozen numbers, as much as a weight where r = m = n.

    Args:
        rank: r; None takes as many as ``energy`` says.
        energy: the share of the squared singular values that the trained ones have together. "More than 99 % of
            the information" is the paper's; that squares are meant is our reading.
        relative: multiply d by sigma, so that a step changes large and small singular values by the same share.
        dropout: share of the branch's inputs that are dropped while training.
        ranks: from :mod:`rankwise.rank_rules`; None gives all layers the same.

    Learning rate: 1e-3, the lower end of what is said to be needed, 1e-3 to 1e-2; not verified in the paper.

    References: Sun et al., "SVFit: Parameter-efficient fine-tuning of large pre-trained models using singular
        values", 2024, arXiv 2409.05926. No published code was found.

    >>> import torch
    >>> from rankwise.matrices import Dense
    >>> base = Base(Dense(torch.diag(torch.tensor([3.0, 2.0, 1.0]))))
    >>> adapted = Svfit(energy=0.9).attach(base, {}, Generator())
    >>> sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    2
    """

    lr: ClassVar[float | None] = 1e-3
    rank: int | None = None
    energy: float = 0.99
    relative: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None:
            check_count("rank", self.rank)
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy must be > 0 and <= 1, got {self.energy!r}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be >= 0 and < 1, got {self.dropout!r}.")

    def attach(self, base: Base, stats: Stats, generator: Generator) -> StructuredMatrix:
        """Return W + U diag(d) V'."""
        u, s, vt = torch.linalg.svd(written_out(base), full_matrices=False)
        r = self._count(s)
        left = u[:, :r] * s[:r] if self.relative else u[:, :r]
        return diagonal_core(base, left, vt[:r], dropout=self.dropout)

    def _count(self, s: Tensor) -> int:
        """How many of the singular values (k,) train."""
        if self.rank is None:
            shares = s.double().square().cumsum(0)
            return 1 + int((shares < self.energy * shares[-1]).sum())
        if self.rank > len(s):
            raise TooSmallError(
                f"rank {self.rank} is larger than the {len(s)} singular values; give a smaller one."
            )
        return self.rank
