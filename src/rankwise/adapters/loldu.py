"""Trained pivots of the LU decomposition (LoLDU)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from ..core.methods import Ranked, check_count
from ..core.statistics import Stats
from ..matrices import Base, StructuredMatrix
from ..matrices.base import TooSmallError
from .diagonal_core import diagonal_core, written_out

SMALL = 1e-6  # of the largest pivot, close to the rounding of float32; a row is not divided by a smaller one


@dataclass(frozen=True, kw_only=True)
class Loldu(Ranked):
    """Train d (r,), from zero, in W + s P L_r diag(d) U_r, with W = P L D U and d the change of r entries of D.

    P L are the columns of the LU decomposition with partial pivoting, put in the order of W's rows, and U has
    ones on its diagonal. Other starts of D than W's own make no difference here, since D counts linearly and
    the start is taken off.

    What it is not: L and U are triangular, not orthogonal, and their first r columns and rows, r being how many
    pivots came first, are no low-rank approximation of W: for a random (256, 256) weight the difference is larger
    than W itself. Of :class:`Svfit`, which trains as many numbers of the singular value decomposition, it has the
    frozen, given directions; the decomposition is what is cheaper.

    The published code puts the difference in the place of W, so that half-precision weights lose bits and any
    start of D but W's own changes the model; it stores P as an (m, m) matrix, and divides by pivots that may be
    zero. Here W stays, P is an order of rows, and rows of zero or tiny pivots are kept as they are. The scale,
    which the paper trains and its code does not, is fixed: it is one more number for what D can do.

    Args:
        rank: r; the published code takes 4, and 768 in its example.
        alpha: s = alpha / rank; None means s = 1. The published code takes 1.
        dropout: share of the branch's inputs that are dropped while training.
        ranks: from :mod:`rankwise.rank_rules`; None gives all layers the same.

    Learning rate: 1e-3, the lower end of what is said to be needed; not verified in the paper, and the code
    names none.

    References: Shi et al., "LoLDU: Low-rank adaptation via lower-diag-upper decomposition for parameter-efficient
        fine-tuning", 2024, arXiv 2410.13618.
    """

    lr: ClassVar[float | None] = 1e-3
    rank: int = 4
    alpha: float | None = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("rank", self.rank)
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be a positive number, got {self.alpha!r}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be >= 0 and < 1, got {self.dropout!r}.")

    def attach(self, base: Base, stats: Stats, generator: Generator) -> StructuredMatrix:
        """Return W + s P L_r diag(d) U_r."""
        if self.rank > min(base.shape):
            raise TooSmallError(
                f"rank {self.rank} is larger than the {min(base.shape)} pivots; give a smaller one."
            )
        lower, _, upper = lower_diagonal_upper(written_out(base))
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        return diagonal_core(base, lower[:, : self.rank], upper[: self.rank], scale, self.dropout)


def lower_diagonal_upper(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose an (m, n) weight as P L diag(d) U.

    Returns:
        P L (m, k), d (k,) and U (k, n) with k = min(m, n). The diagonal of U is 1; where a pivot is zero or
        tiny, d is 1 and the row of U is what the elimination left.
    """
    compact, swaps, _ = torch.linalg.lu_factor_ex(weight)  # which goes on where a pivot is zero
    _, lower, upper = torch.lu_unpack(compact, swaps, unpack_pivots=False)
    order = list(range(len(weight)))
    for i, j in enumerate(swaps.tolist()):
        order[i], order[j - 1] = order[j - 1], order[i]
    back = torch.tensor(order, device=weight.device).argsort()  # row i of W is row back[i] of L D U
    pivots = upper.diagonal()
    pivots = torch.where(pivots.abs() > SMALL * pivots.abs().max(), pivots, torch.ones_like(pivots))
    return lower[back], pivots, upper / pivots[:, None]
