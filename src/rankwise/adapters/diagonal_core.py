"""What adapters share that train one number for each of a weight's own directions."""

import torch
from torch import Tensor

from ..matrices import Base, Branch, Dense, Diagonal, Frozen, Product, StructuredMatrix, Sum


def diagonal_core(
    base: Base, left: Tensor, right: Tensor, scale: float = 1.0, dropout: float = 0.0
) -> StructuredMatrix:
    """Return W + s U diag(d) V with d = 0 trained.

    U and V are stored with the adapter: made again on another machine they may have other signs, and another
    basis where directions count the same.

    Args:
        base: W, (m, n).
        left: U, (m, r).
        right: V, (r, n).
        scale: s.
        dropout: share of the branch's inputs that are dropped while training.
    """
    core = Diagonal(torch.zeros_like(left[0]))
    frozen = Frozen(Dense(left.contiguous())), Frozen(Dense(right.contiguous()))
    return Sum(base, Branch(Product(frozen[0], core, frozen[1]), scale, dropout))


def written_out(base: Base) -> Tensor:
    """Return the weight to decompose, (m, n), in float32 or wider."""
    weight = base.dense().detach()
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
