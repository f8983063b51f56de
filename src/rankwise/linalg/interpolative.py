"""Choose rows of a tall matrix that span all the others with small coefficients."""

import torch
from torch import Tensor


def interpolative_rows(tall: Tensor, *, bound: float = 1.1) -> tuple[Tensor, Tensor, Tensor]:
    """Choose r independent rows of an (m, r) matrix and write the other rows in terms of them.

    Rows are first taken in the order of Gaussian elimination with partial pivoting on an
    orthonormal basis of the columns; then a kept and another row are exchanged as long as a
    coefficient is larger than ``bound``. Every exchange multiplies the volume of the kept rows by
    that coefficient, so it ends, and at the end |mix| <= bound.

    Args:
        tall: (m, r) with m >= r and full column rank; rank deficiency gives a basis of its columns' span.
        bound: largest coefficient, > 1.

    Returns:
        kept (r,) and others (m - r,), both increasing, and mix (m - r, r), in the dtype of ``tall``, such that
        ``tall[others] == mix @ tall[kept]``.

    References: Goreinov, Oseledets, Savostyanov, Tyrtyshnikov, Zamarashkin, "How to find a good
        submatrix", 2010 (maxvol); Gu and Eisenstat, 1996 (strong rank-revealing factorisations).

    >>> import torch
    >>> kept, others, mix = interpolative_rows(torch.tensor([[1.0], [4.0], [2.0]]))
    >>> kept.tolist(), others.tolist(), mix.tolist()
    ([1], [0, 2], [[0.25], [0.5]])
    """
    if bound <= 1:
        raise ValueError(f"bound must be > 1, got {bound}.")
    m, r = tall.shape
    if m < r:
        raise ValueError(f"needs at least as many rows as columns, got {tuple(tall.shape)}.")
    basis = torch.linalg.qr(tall.double())[0]  # (m, r), orthonormal also where tall is deficient
    lower, exchanges = torch.linalg.lu_factor(basis)
    order = list(range(m))  # row order[i] of tall is row i of lower
    for i, j in enumerate(exchanges.tolist()):
        order[i], order[j - 1] = order[j - 1], order[i]
    rows = torch.tensor(order, device=tall.device)
    mix = torch.linalg.solve_triangular(lower[:r], lower[r:], upper=False, left=False, unitriangular=True)
    while mix.numel():
        worst = int(mix.abs().argmax())
        i, j = divmod(worst, r)
        pivot = mix[i, j].clone()
        if pivot.abs() <= bound:
            break
        # Exchange kept row j and other row i: others become mix - mix[:, j] (mix[i] - e_j) / pivot.
        change = mix[i].clone()
        change[j] -= 1
        column = mix[:, j].clone()
        column[i] += 1
        mix.addr_(column, change / pivot, alpha=-1)
        rows[j], rows[r + i] = rows[r + i].clone(), rows[j].clone()
    kept, kept_order = rows[:r].sort()
    others, others_order = rows[r:].sort()
    return kept, others, mix[others_order][:, kept_order].to(tall.dtype)
