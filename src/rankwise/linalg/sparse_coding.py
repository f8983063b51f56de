"""Orthogonal matching pursuit for many rows at once."""

import torch
from torch import Tensor

from .masks import check_groups

CHUNK = 2**22  # numbers of the factors of the rows that are worked on together: what a cache holds


def matching_pursuit(
    gram: Tensor, moments: Tensor, kept: int, *, group: int | None = None, picks: int = 1
) -> tuple[Tensor, Tensor]:
    """Write rows as combinations of few atoms each: again and again take the atom nearest to what is left.

    A row y and the atoms A (k, n), of length 1, are needed only as y A' and A A'. After each pick the
    coefficients are the least-squares solution on the atoms taken, kept up to date through the inverse of the
    Cholesky factor of their Gram matrix. A row whose next atom is a combination of those it has, or which is met
    exactly, stops with fewer; where one of several picks is such and the row is not met, it begins again with
    single ones.

    Args:
        gram: A A' (k, k).
        moments: Y A' (m, k).
        kept: atoms of a row, or of each ``group`` neighbouring atoms of a row.
        group: None for the whole row.
        picks: atoms taken between two least-squares solutions; 1 is orthogonal matching pursuit itself, more take
            fewer solutions and may take worse atoms (generalised orthogonal matching pursuit).

    Returns:
        coefficients (m, k), and the mask (m, k) of the atoms taken.

    Raises:
        ValueError: if the groups do not fit.

    References: Rubinstein, Zibulevsky, Elad, "Efficient implementation of the K-SVD algorithm using batch
        orthogonal matching pursuit", 2008; Wang, Kwon, Shim, "Generalized orthogonal matching pursuit", 2012.

    >>> import torch
    >>> codes, mask = matching_pursuit(torch.eye(3), torch.tensor([[1.0, -3.0, 2.0]]), 2)
    >>> codes.tolist(), mask.tolist()
    ([[0.0, -3.0, 2.0]], [[False, True, True]])
    """
    group = group or gram.shape[0]
    check_groups(gram.shape[0], kept, group)
    if picks < 1:
        raise ValueError(f"picks must be >= 1, got {picks}.")
    codes, mask = _in_chunks(gram, moments, kept, group, picks)
    if picks > 1:
        left = (moments - codes @ gram).abs().amax(1)
        again = (mask.sum(1) < kept * gram.shape[0] // group) & (left > _smallest(moments))
        codes[again], mask[again] = _in_chunks(gram, moments[again], kept, group, 1)
    return codes, mask


def _smallest(moments: Tensor) -> Tensor:
    """Return (m,) the correlations of rows that are as good as none."""
    return 100 * torch.finfo(moments.dtype).eps * moments.abs().amax(1)


def _in_chunks(gram: Tensor, moments: Tensor, kept: int, group: int, picks: int) -> tuple[Tensor, Tensor]:
    total = kept * gram.shape[0] // group
    parts = [
        _pursue(gram, chunk, kept, group, total, picks) for chunk in moments.split(max(CHUNK // total**2, 1))
    ]
    codes, masks = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(masks)


def _pursue(
    gram: Tensor, moments: Tensor, kept: int, group: int, total: int, picks: int
) -> tuple[Tensor, Tensor]:
    rows = len(moments)
    lines = torch.arange(rows, device=moments.device)[:, None]
    accuracy = 100 * torch.finfo(moments.dtype).eps
    smallest = _smallest(moments)
    codes, mask = torch.zeros_like(moments), torch.zeros_like(moments, dtype=torch.bool)
    factor = moments.new_zeros(rows, total, total)  # V, lower triangular: V' V is the inverse of the taken Gram
    taken = torch.zeros(rows, total, dtype=torch.int64, device=moments.device)
    alive = torch.ones(rows, dtype=torch.bool, device=moments.device)
    left, have = moments, 0
    while have < total and bool(alive.any()):
        more = min(picks, total - have)
        new = _nearest(left, mask, kept, group, more)
        before, end = factor[:, :have, :have], have + more
        mixed = before @ gram[taken[:, :have, None], new[:, None, :]]  # (rows, have, more)
        rest = gram[new[:, :, None], new[:, None, :]] - mixed.mT @ mixed
        alive &= left.gather(1, new).abs().amin(1) > smallest
        root, info = torch.linalg.cholesky_ex(rest)
        pivots = root.diagonal(dim1=1, dim2=2).square()
        alive &= (info == 0) & (pivots > accuracy * gram.diagonal()[new]).all(1)
        root = torch.where(alive[:, None, None], root, torch.eye(more).to(root))
        inverse = torch.linalg.solve_triangular(root, torch.eye(more).to(root), upper=False)
        inverse = inverse * alive[:, None, None]
        taken[:, have:end] = new
        factor[:, have:end, :have] = -(inverse @ mixed.mT) @ before
        factor[:, have:end, have:end] = inverse
        lines_new = factor[:, have:end, :end]
        length = lines_new @ moments.gather(1, taken[:, :end])[:, :, None]  # (rows, more, 1)
        codes.scatter_add_(1, taken[:, :end], (lines_new * length).sum(1))
        mask[lines.expand_as(new), new] |= alive[:, None]
        left, have = moments - codes @ gram, end
    return codes, mask


def _nearest(left: Tensor, mask: Tensor, kept: int, group: int, more: int) -> Tensor:
    """Return the atoms (rows, more) with the largest correlations that may still be taken."""
    score = left.abs().masked_fill(mask, -1)
    if group < left.shape[1]:
        groups = score.view(len(score), -1, group)
        room = kept - mask.view(groups.shape).sum(2, keepdim=True)
        place = groups.argsort(dim=2, descending=True).argsort(dim=2)
        score = torch.where(place < room, groups, -1).view(score.shape)
    return score.topk(more, dim=1).indices
