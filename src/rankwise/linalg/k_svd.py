"""Learn atoms of which every row of a matrix is a combination of few."""

import torch
from torch import Tensor

from .masks import largest_in_groups
from .sparse_coding import matching_pursuit


def k_svd(
    rows: Tensor,
    *,
    atoms: int,
    kept: int,
    group: int | None = None,
    steps: int,
    powers: int,
    picks: int = 1,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find codes Z (m, k), ``kept`` entries in every row, and atoms A (k, n) of length 1, with Z A near Y (m, n).

    The error is sum_i w_i |y_i - z_i A|^2. In turns, matching pursuit finds the codes, and each atom in its turn
    is refitted together with its coefficients: the rows that use it, less their other atoms, are approximated by
    a matrix of rank one through a few power iterations, which never increase the error. An atom that no row uses
    becomes the row that is met worst. Atoms start as the leading right singular vectors of the weighted rows, and
    beyond their number as rows drawn evenly. The best pair met is returned.

    Args:
        rows: Y (m, n); the work is done in its type.
        atoms: k.
        kept: entries of a row, or of each ``group`` neighbouring entries of a row.
        group: None for the whole row.
        steps: turns.
        powers: power iterations for an atom; 1 is approximate K-SVD.
        picks: see :func:`matching_pursuit`.
        weights: w (m,), None for ones.

    Returns:
        Z, dense with its zeros, the mask of its entries, of which every row has the full number, and A.

    References: Aharon, Elad, Bruckstein, "K-SVD", 2006; Rubinstein, Zibulevsky, Elad, 2008 (the approximate one).
    """
    if min(atoms, steps, powers) < 1:
        raise ValueError(f"atoms, steps and powers must be >= 1, got {atoms}, {steps} and {powers}.")
    group = group or atoms
    scale = rows.new_ones(len(rows)) if weights is None else weights.to(rows).sqrt()
    rows = scale[:, None] * rows  # the codes of a longer row are longer, and as sparse
    basis = _first_atoms(rows, atoms)
    best, found = torch.inf, None
    for _ in range(steps):
        codes, mask = matching_pursuit(basis @ basis.mT, rows @ basis.mT, kept, group=group, picks=picks)
        codes, basis, residual = _update(rows, codes, mask, basis, powers)
        error = float(residual.square().sum())
        if error < best or found is None:
            best, found = error, (codes, mask, basis)
        basis = _revived(rows, basis, mask, residual)
    assert found is not None
    codes, mask, basis = found
    whole = largest_in_groups(mask.to(codes.dtype), kept, group)
    shorter = torch.where(scale > 0, scale, torch.ones_like(scale))
    return codes / shorter[:, None], whole, basis


def _first_atoms(rows: Tensor, atoms: int) -> Tensor:
    leading = torch.linalg.eigh((rows.mT @ rows).double())[1].mT.flip(0)[:atoms].to(rows.dtype)
    extra = atoms - len(leading)
    drawn = rows[torch.arange(extra, device=rows.device) * len(rows) // max(extra, 1) % len(rows)]
    return torch.cat([leading, _unit(drawn)])


def _update(
    rows: Tensor, codes: Tensor, mask: Tensor, basis: Tensor, powers: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Refit every atom and its coefficients once; return both, and what is left of the rows."""
    columns, basis = codes.mT.contiguous(), basis.clone()  # a coefficient of every row stands together
    residual = rows - codes @ basis
    for j in mask.any(0).nonzero()[:, 0].tolist():
        users = mask[:, j].nonzero()[:, 0]
        code, atom = columns[j, users], basis[j]
        own = residual[users].addr_(code, atom)
        for _ in range(powers):
            atom = _unit(code @ own)
            code = own @ atom
        residual[users] = own.addr_(code, atom, alpha=-1)
        columns[j, users], basis[j] = code, atom
    return columns.mT, basis, residual


def _revived(rows: Tensor, basis: Tensor, mask: Tensor, residual: Tensor) -> Tensor:
    """Put the rows that are met worst in place of the atoms that no row uses."""
    unused = (~mask.any(0)).nonzero()[:, 0]
    worst = residual.square().sum(1).topk(min(len(unused), len(residual))).indices
    basis = basis.clone()
    basis[unused[: len(worst)]] = _unit(rows[worst])
    return basis


def _unit(x: Tensor) -> Tensor:
    """Give the last axis length 1; zeros become the first unit vector."""
    first = torch.zeros_like(x)
    first[..., 0] = 1
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm > torch.finfo(x.dtype).tiny ** 0.5, x / norm, first)
