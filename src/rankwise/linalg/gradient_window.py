"""The curvature that a few gradients make, its inverse, and the replacement of one of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .scaled_plus_low_rank import damped_root

CHUNK = 1 << 22  # numbers of a copy of some rows in a wider type


@dataclass(frozen=True)
class GradientWindow:
    """A = damping I + G'G / count for the gradients G (..., k, d), with no matrix of d x d numbers.

    Its inverse is (I - G'(GG' + count damping I)^-1 G) / damping (Woodbury). Leading axes are those of blocks,
    each with a matrix of its own. The order of the gradients says nothing.

    Args:
        rows: G, of any floating-point type; it is multiplied in that of ``gram``.
        gram: GG' (..., k, k), float32 or float64.
        damping: > 0.
        count: > 0, by which means are taken; rows of zeros may be among the k.

    References: Frantar, Kurtic, Alistarh, "M-FAC: efficient matrix-free approximations of second-order
        information", NeurIPS 2021, arXiv 2107.03356, which reaches the same numbers by successive outer products
        (static) and by an LU decomposition without pivots (dynamic). Here it is a Cholesky factor.

    >>> window = GradientWindow.of(torch.tensor([[1.0, 1.0]]), damping=1.0)
    >>> window.solve(torch.tensor([3.0, 0.0])), window.diag_inverse()
    (tensor([ 2.0000, -1.0000]), tensor([0.6667, 0.6667]))
    """

    rows: Tensor
    gram: Tensor
    damping: float
    count: int

    @classmethod
    def of(cls, rows: Tensor, *, damping: float, count: int | None = None) -> "GradientWindow":
        """Make A from gradients (..., k, d) in float32 or float64; ``count`` None means k."""
        return cls(rows, rows @ rows.mT, damping, rows.shape[-2] if count is None else count)

    def dense(self) -> Tensor:
        """A, (..., d, d)."""
        rows = self.rows.to(self.gram.dtype)
        return rows.mT @ rows / self.count + self.damping * torch.eye(rows.shape[-1]).to(rows)

    def root(self) -> Tensor:
        """The lower triangular L (..., k, k) with LL' = GG' + count damping I."""
        return damped_root(self.gram, self.count * self.damping)

    def products(self, x: Tensor) -> Tensor:
        """G x, (..., k), for x (..., d)."""
        if self.rows.dtype == self.gram.dtype:
            return (self.rows @ x[..., None])[..., 0]
        return torch.cat([(part.to(x.dtype) @ x[..., None])[..., 0] for part in self._parts()], -1)

    def combination(self, weights: Tensor) -> Tensor:
        """G'c, (..., d), for c (..., k)."""
        if self.rows.dtype == self.gram.dtype:
            return (weights[..., None, :] @ self.rows)[..., 0, :]
        found = weights.new_zeros(*weights.shape[:-1], self.rows.shape[-1])
        for part, each in zip(self._parts(), weights.split(self._step(), -1), strict=True):
            found += (each[..., None, :] @ part.to(weights.dtype))[..., 0, :]
        return found

    def solve(self, x: Tensor) -> Tensor:
        """A^-1 x for x (..., d)."""
        weights = torch.cholesky_solve(self.products(x)[..., None], self.root())[..., 0]
        return (x - self.combination(weights)) / self.damping

    def solve_near(self, place: int, x: Tensor) -> Tensor:
        """A^-1 x for x (d,) that is the gradient in this place, but for what its type has rounded off.

        Then x = G'e + r, and A^-1 G'e = count G'(GG' + count damping I)^-1 e has none of the cancellation that
        ``solve`` divides by the damping; r, which is mostly zero, is solved for in the usual way.
        """
        unit = self.gram.new_zeros(len(self.gram), 1)
        unit[place] = self.count
        found = self.combination(torch.cholesky_solve(unit, self.root())[:, 0])
        rest = x - self.rows[place].to(x.dtype)
        return found + self.solve(rest) if bool(rest.any()) else found

    def diag_inverse(self) -> Tensor:
        """The diagonal of A^-1, (..., d)."""
        return (1 - self._whitened().square().sum(-2)) / self.damping

    def entries(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return entries of A^-1: (j,) numbers of rows and of columns, (..., j)."""
        white = self._whitened()
        return ((rows == columns).to(white) - (white[..., rows] * white[..., columns]).sum(-2)) / self.damping

    def quadratic(self, x: Tensor) -> Tensor:
        """x'Ax, (...), for x (..., d)."""
        return self.products(x).square().sum(-1) / self.count + self.damping * x.square().sum(-1)

    def replace_row(self, place: int, row: Tensor) -> None:
        """Put another gradient (..., d) in the place of one, for one product with G; writes into both."""
        self.rows[..., place, :] = row
        found = self.products(self.rows[..., place, :].to(self.gram.dtype))
        self.gram[..., place, :] = found
        self.gram[..., :, place] = found

    def _whitened(self) -> Tensor:
        """L^-1 G, (..., k, d), so that A^-1 = (I - (L^-1 G)'(L^-1 G)) / damping."""
        return torch.linalg.solve_triangular(self.root(), self.rows.to(self.gram.dtype), upper=False)

    def _step(self) -> int:
        return max(1, CHUNK // max(1, self.rows.shape[-1]))

    def _parts(self) -> tuple[Tensor, ...]:
        return self.rows.split(self._step(), -2)
