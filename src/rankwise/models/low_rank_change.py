"""What an adapter adds to a matrix, as two thin factors."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.surgery import base_of
from ..matrices import Base, Branch, Scaled, StructuredMatrix, Sum
from ..matrices.thin import thin_factors
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


def branch_of(matrix: StructuredMatrix) -> Branch | None:
    """Return the one branch that is added to a base, or a multiple of it, if an expression is just that."""
    match matrix.parts if isinstance(matrix, Sum) else []:
        case [Base(), Branch() as branch]:
            return branch
        case [Base(), Scaled(matrix=Branch() as branch, scale=weight)]:
            return Branch(branch.matrix, weight * branch.scale, branch.dropout)
    return None


def _beside(matrix: StructuredMatrix) -> Change | None:
    """Return what is added to the base, if the expression is a sum of it and of thin matrices."""
    others = terms_beside(matrix)
    if not others:
        return None
    branch = branch_of(matrix)
    if branch is not None:
        factors = thin_factors(branch.matrix)
        return factors and Change(*factors, branch.scale, branch.dropout)
    factors, (dropout, *more) = thin_factors(Sum(*others)), {d for term in others for d in _dropouts(term)}
    return factors and Change(*factors, dropout=0.0 if more else dropout)


def _dropouts(term: StructuredMatrix) -> set[float]:
    """Return the shares of inputs that are dropped before the parts of a term, 0 where none are."""
    match term:
        case Branch():
            return {term.dropout}
        case Scaled():
            return _dropouts(term.matrix)
        case Sum():
            return {dropout for part in term.parts for dropout in _dropouts(part)}
    return {0.0}


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
