"""The factors of matrices of a low rank, read from their structure."""

import torch
from torch import Tensor

from .base import StructuredMatrix
from .branch import Branch
from .expressions import Product, Scaled, Sum
from .frozen import Frozen
from .low_rank import LowRank
from .scheduled import Scheduled


def bare(matrix: StructuredMatrix) -> StructuredMatrix:
    """Take off what stands around a matrix and has the same values."""
    while isinstance(matrix, Frozen | Scheduled):
        matrix = matrix.matrix
    return matrix


def thin_factors(matrix: StructuredMatrix) -> tuple[Tensor, Tensor] | None:
    """Return (m, r) and (r, n) factors of a thin matrix, with the least r that its structure shows, or None.

    Gradients go through them.

    >>> import torch
    >>> one = LowRank(torch.ones(3, 1), torch.ones(1, 2))
    >>> [tuple(factor.shape) for factor in thin_factors(Sum(one, Scaled(one, -1.0)))]
    [(3, 2), (2, 2)]
    """
    inner = bare(matrix)
    if isinstance(inner, LowRank):
        return inner.left, inner.right
    if isinstance(inner, Branch | Scaled):
        found = thin_factors(inner.matrix)
        return None if found is None else (inner.scale * found[0], found[1])
    if isinstance(inner, Sum):
        lefts, rights = [], []
        for part in inner.parts:
            found = thin_factors(part)
            if found is None:
                return None
            lefts.append(found[0])
            rights.append(found[1])
        return torch.cat(lefts, 1), torch.cat(rights)
    if isinstance(inner, Product):
        i = min(range(len(inner.parts)), key=lambda i: inner.parts[i].rank)
        left, right = thin_factors(inner.parts[i]) or _written_out(inner.parts[i])
        for part in reversed(inner.parts[:i]):
            left = part(left.mT).mT
        for part in inner.parts[i + 1 :]:
            right = part.adjoint(right)
        return left, right
    return _written_out(inner) if inner.rank < min(inner.shape) else None


def _written_out(matrix: StructuredMatrix) -> tuple[Tensor, Tensor]:
    """Return factors of a matrix, one of them itself or, where its structure has a lower rank, by its SVD."""
    (m, n), dense = matrix.shape, matrix.dense()
    if matrix.rank < min(m, n):
        u, s, vt = torch.linalg.svd(dense.double(), full_matrices=False)
        r = matrix.rank
        return (u[:, :r] * s[:r]).to(dense.dtype), vt[:r].to(dense.dtype)
    one = torch.eye(min(m, n), dtype=dense.dtype, device=dense.device)
    return (dense, one) if n <= m else (one, dense)
