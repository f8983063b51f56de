"""Choose rows of a positive semi-definite kernel that tell nearly all about the others."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .scaled_plus_low_rank import damped_root


@dataclass(frozen=True)
class Interpolation:
    """A kernel K = U'U in terms of r chosen columns of U: U is nearly U[:, rows] mix.

    Args:
        rows: (r,), in the order in which they were chosen.
        mix: P, (r, n), which is the identity on the chosen rows; U[:, rows] P is the orthogonal projection of U.
        residual: E = K - P' K[rows, rows] P, (n, n), positive semi-definite and zero on the chosen rows.
    """

    rows: Tensor
    mix: Tensor
    residual: Tensor

    @property
    def others(self) -> Tensor:
        """The rows that were not chosen, (n - r,)."""
        left = torch.ones(self.mix.shape[1], dtype=torch.bool, device=self.rows.device)
        left[self.rows] = False
        return left.nonzero()[:, 0]

    def damped(self, damping: float) -> Tensor:
        """Return the lower triangular L (r, r) with L L' = P (I + E / damping)^-1 P'.

        It is what remains of (I + E / damping)^-1, in which E counts as damping, for the chosen rows.

        Raises:
            ValueError: if damping is not positive.
        """
        others = self.others
        root = damped_root(self.residual[others][:, others] / damping, 1.0)
        half = torch.linalg.solve_triangular(root, self.mix[:, others].mT, upper=False)
        return damped_root(half.mT @ half, 1.0)  # P is the identity on the chosen rows, where E is zero


def pivoted_cholesky(kernel: Tensor, rank: int, *, tolerance: float | None = None) -> Interpolation:
    """Choose up to ``rank`` rows of an (n, n) kernel, always the one of which the least is told by then.

    These are the rows that a column-pivoted QR of U takes, without U: n r^2 multiplications. The residual is the
    Schur complement of K[rows, rows].

    Args:
        kernel: symmetric, positive semi-definite up to rounding.
        rank: r; fewer rows are chosen where the others tell nothing new, such as copies or zeros.
        tolerance: of the largest diagonal entry, at which a pivot counts as zero; None means n times the
            rounding error of the type.

    Raises:
        ValueError: if ``rank`` is negative.

    References: Harbrecht, Peters, Schneider, "On the low-rank approximation by the pivoted Cholesky
        decomposition", 2012.

    >>> found = pivoted_cholesky(torch.tensor([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 3.0]]), 1)
    >>> found.rows.tolist(), found.mix.tolist(), found.residual.diagonal().tolist()
    ([1], [[0.5, 1.0, 0.0]], [0.0, 0.0, 3.0])
    """
    if rank < 0:
        raise ValueError(f"rank must be >= 0, got {rank}.")
    n, left = len(kernel), kernel.diagonal().clone()
    least = n * torch.finfo(kernel.dtype).eps if tolerance is None else tolerance
    floor = least * torch.cat([left, left.new_zeros(1)]).max()
    factor, open_ = kernel.new_zeros(n, min(rank, n)), torch.ones_like(left)
    rows, pivots = [left.new_empty(0, dtype=torch.long)], [left[:0]]
    for j in range(factor.shape[1]):  # nothing here waits for an accelerator
        row = left.argmax()[None]
        rows.append(row)
        pivots.append(left[row])
        column = kernel.index_select(1, row)[:, 0] - factor[:, :j] @ factor.index_select(0, row)[0, :j]
        factor[:, j] = column * open_ / column[row].clamp_min(floor).sqrt()
        left = (left - factor[:, j].square()).index_fill(0, row, -torch.inf)
        open_ = open_.index_fill(0, row, 0.0)
    count = int((torch.cat(pivots) > floor).long().cumprod(0).sum())
    return _interpolation(kernel, factor[:, :count], torch.cat(rows)[:count])


def _interpolation(kernel: Tensor, factor: Tensor, rows: Tensor) -> Interpolation:
    """From the chosen columns L (n, r) of the Cholesky factor: P = L[rows]'^-1 L', and E = K - L L'."""
    mix = torch.linalg.solve_triangular(factor[rows].mT, factor.mT, upper=True)
    mix[:, rows] = torch.eye(len(rows), dtype=mix.dtype, device=mix.device)
    residual = kernel - factor @ factor.mT
    residual[rows] = 0
    residual[:, rows] = 0
    return Interpolation(rows, mix, residual)
