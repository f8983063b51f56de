"""What an adapter adds to a matrix, as two thin factors."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.surgery import base_of
from ..matrices import Base, Branch, Frozen, LowRank, Product, Scaled, Scheduled, StructuredMatrix, Sum
from .lines import terms_beside

NOISE = 1e-11  # singular values of a change that are no more than rounding in float64, relative to the base's


@dataclass(frozen=True)
class Change:
    """``scale * left @ right``, beside the matrix that an adapter changes.

    Args:
        left: (m, r).
        right: (r, n).
        scale: what the product counts.
        dropout: of the inputs while training.
        error: size of what is left out, relative to that of the change, in the Frobenius norm.
    """

    left: Tensor
    right: Tensor
    scale: float = 1.0
    dropout: float = 0.0
    error: float = 0.0


def change_of(matrix: StructuredMatrix, rank: int | None = None) -> Change | None:
    """Return the change that an adapted matrix makes, or None if it is of no low rank.

    Where the expression adds products of thin matrices, their factors are taken; otherwise the two matrices are
    written out in float64 and subtracted, and singular values that are no more than rounding are left out. Then a
    rank is low if the factors hold fewer numbers than the matrix.

    Args:
        matrix: with an adapter.
        rank: the largest; None is the largest that a matrix can have. What does not fit is left out, the least
            important first.
    """
    m, n = matrix.shape
    with torch.no_grad():
        found = _beside(matrix)
        if found is None:
            found = _subtracted(matrix)
            if rank is None and found.left.shape[1] * (m + n) >= m * n:
                return None
        most = min(m, n) if rank is None else min(rank, m, n)
        return _truncated(found, most) if found.left.shape[1] > most else found


def bare(matrix: StructuredMatrix) -> StructuredMatrix:
    """Take off what stands around a matrix and has the same values."""
    while isinstance(matrix, WRAPPERS):
        matrix = matrix.matrix
    return matrix


WRAPPERS = (Frozen, Scheduled)


def branch_of(matrix: StructuredMatrix) -> Branch | None:
    """Return the one branch that is added to a base, if an expression is just that."""
    match matrix.parts if isinstance(matrix, Sum) else []:
        case [Base(), Branch() as branch]:
            return branch
    return None


def _beside(matrix: StructuredMatrix) -> Change | None:
    """Return what is added to the base, if the expression is a sum of it and of thin matrices."""
    others = terms_beside(matrix)
    if not others:
        return None
    branch = branch_of(matrix)
    if branch is not None:
        factors = _factors(branch.matrix)
        return factors and Change(*factors, branch.scale, branch.dropout)
    factors = _factors(Sum(*others))
    return factors and Change(*factors)


def _factors(matrix: StructuredMatrix) -> tuple[Tensor, Tensor] | None:
    """Return the (m, r) and (r, n) factors of a thin matrix, with the least r that its structure shows."""
    match bare(matrix):
        case LowRank() as low:
            return low.left, low.right
        case Branch() | Scaled() as multiple:
            found = _factors(multiple.matrix)
            return found and (multiple.scale * found[0], found[1])
        case Sum() as total:
            each = [_factors(part) for part in total.parts]
            known = [found for found in each if found is not None]
            if len(known) < len(each):
                return None
            lefts, rights = zip(*known, strict=True)
            return torch.cat(lefts, 1), torch.cat(rights)
        case Product() as product:
            i = min(range(len(product.parts)), key=lambda i: product.parts[i].rank)
            left, right = _factors(product.parts[i]) or _written_out(product.parts[i])
            for part in reversed(product.parts[:i]):
                left = part(left.mT).mT
            for part in product.parts[i + 1 :]:
                right = part.adjoint(right)
            return left, right
        case other:
            return _written_out(other) if other.rank < min(other.shape) else None


def _written_out(matrix: StructuredMatrix) -> tuple[Tensor, Tensor]:
    """Return factors of a matrix, one of them itself or, where its structure has a lower rank, by its SVD."""
    (m, n), dense = matrix.shape, matrix.dense()
    if matrix.rank < min(m, n):
        u, s, vt = torch.linalg.svd(dense.double(), full_matrices=False)
        r = matrix.rank
        return (u[:, :r] * s[:r]).to(dense.dtype), vt[:r].to(dense.dtype)
    one = torch.eye(min(m, n), dtype=dense.dtype, device=dense.device)
    return (dense, one) if n <= m else (one, dense)


def _subtracted(matrix: StructuredMatrix) -> Change:
    wide = copy.deepcopy(matrix).double().eval()
    base = base_of(wide)
    assert base is not None
    before = base.dense()
    u, s, vt = torch.linalg.svd(wide.dense() - before, full_matrices=False)
    r = max(1, int((s > NOISE * before.norm()).sum()))
    kind = torch.promote_types(matrix.dtype, torch.float32)
    root = s[:r].sqrt()
    return Change((u[:, :r] * root).to(kind), (root[:, None] * vt[:r]).to(kind))


def _truncated(change: Change, rank: int) -> Change:
    """Keep the most important directions of a change."""
    left, right = change.left.double(), change.right.double()
    q, a = torch.linalg.qr(left)
    p, b = torch.linalg.qr(right.mT)
    u, s, vt = torch.linalg.svd(a @ b.mT)
    root, kind = s[:rank].sqrt(), change.left.dtype
    error = float(s[rank:].norm() / s.norm()) if float(s.norm()) else 0.0
    first, second = (q @ u[:, :rank] * root).to(kind), (root[:, None] * (vt[:rank] @ p.mT)).to(kind)
    return Change(first, second, change.scale, change.dropout, error)
