"""Low-rank matrices in two gauges: two factors, or some of the rows and how they make the others."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..linalg import interpolative_rows
from .base import StructuredMatrix, check_2d, check_permutation, check_rank, shape_of, size


class LowRank(StructuredMatrix):
    """The product of two thin factors, r (m + n) numbers.

    Args:
        left: (m, r).
        right: (r, n).

    >>> import torch
    >>> LowRank(torch.ones(3, 1), torch.ones(1, 2)).dense().shape
    torch.Size([3, 2])
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__()
        check_2d("left", left)
        check_2d("right", right)
        if left.shape[1] != right.shape[0]:
            raise ValueError(f"left (m, r) and right (r, n) disagree: {tuple(left.shape)}, {tuple(right.shape)}.")
        check_rank(left.shape[1], left.shape[0], right.shape[1])
        self.left, self.right = nn.Parameter(left), nn.Parameter(right)
        self.shape = (left.shape[0], right.shape[1])

    @classmethod
    def from_factors(cls, left: Tensor, right: Tensor) -> Self:
        """Keep the two factors as they are, with their norms balanced direction by direction."""
        scale = (right.norm(dim=1) / left.norm(dim=0).clamp_min(torch.finfo(left.dtype).tiny)).sqrt()
        scale = torch.where((scale > 0) & scale.isfinite(), scale, torch.ones_like(scale))
        return cls(left * scale, right / scale[:, None])

    @staticmethod
    def stored(m: int, n: int, r: Tensor) -> tuple[Tensor, Tensor]:
        """How many floating-point numbers and how many int32 indices rank r takes."""
        return r * (m + n), torch.zeros_like(r)

    @property
    def rank(self) -> int:
        """The number of columns of the left factor."""
        return self.left.shape[1]

    @property
    def macs(self) -> int:
        """One multiply-add a stored number."""
        return self.left.numel() + self.right.numel()

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m) through r coordinates."""
        return x @ self.right.mT @ self.left.mT

    def adjoint(self, y: Tensor) -> Tensor:
        """(..., m) -> (..., n) through r coordinates."""
        return y @ self.left @ self.right

    def dense(self) -> Tensor:
        """(m, n)."""
        return self.left @ self.right

    def spec(self) -> dict[str, Any]:
        """Kind, shape and rank."""
        return {"kind": "LowRank", "shape": list(self.shape), "rank": self.rank}

    @classmethod
    def empty(cls, spec: Mapping[str, Any], **where: Any) -> Self:
        """Factors of the spec's sizes, not initialised."""
        m, n = shape_of(spec)
        r = size(spec, "rank", largest=min(m, n))
        return cls(torch.empty(m, r, **where), torch.empty(r, n, **where))


class PivotedLowRank(StructuredMatrix):
    """A rank-r matrix as r of its rows and, for each other row, its combination of those.

    A rank-r (m, n) matrix has r (m + n - r) degrees of freedom; this gauge stores exactly so many
    numbers, and one int32 permutation of the rows, and applies them with as many multiply-adds.

    Args:
        rows: (r, n), the rows that are kept.
        mix: (m - r, r), the other rows in terms of these.
        order: (m,) int32, where each row of the matrix stands in ``[rows; mix @ rows]``.

    References: the interpolative decomposition (Cheng, Gimbutas, Martinsson, Rokhlin, 2005); as a way to
        store compressed layers, PIFA, arXiv 2501.19090.

    >>> import torch
    >>> a, b = torch.randn(6, 2), torch.randn(2, 5)
    >>> matrix = PivotedLowRank.from_factors(a, b)
    >>> bool(torch.allclose(matrix.dense(), a @ b, atol=1e-5)), sum(p.numel() for p in matrix.parameters())
    (True, 18)
    """

    order: Tensor

    def __init__(self, rows: Tensor, mix: Tensor, order: Tensor) -> None:
        super().__init__()
        check_2d("rows", rows)
        check_2d("mix", mix)
        if mix.shape[1] != rows.shape[0]:
            raise ValueError(f"rows (r, n) and mix (m - r, r) disagree: {tuple(rows.shape)}, {tuple(mix.shape)}.")
        m = rows.shape[0] + mix.shape[0]
        check_rank(rows.shape[0], m, rows.shape[1])
        if order.shape != (m,):
            raise ValueError(f"order must have shape ({m},), got {tuple(order.shape)}.")
        self.rows, self.mix = nn.Parameter(rows), nn.Parameter(mix)
        self.register_buffer("order", order.to(torch.int32))
        self.shape = (m, rows.shape[1])

    @classmethod
    def from_factors(cls, left: Tensor, right: Tensor) -> Self:
        """Choose r independent rows of ``left @ right`` such that the other combinations stay small."""
        kept, others, mix = interpolative_rows(left)
        order = torch.cat([kept, others]).argsort()
        return cls(left[kept] @ right, mix, order)

    @staticmethod
    def stored(m: int, n: int, r: Tensor) -> tuple[Tensor, Tensor]:
        """How many floating-point numbers and how many int32 indices rank r takes."""
        return r * (m + n - r), torch.full_like(r, m)

    @property
    def rank(self) -> int:
        """How many rows are kept."""
        return self.rows.shape[0]

    @property
    def macs(self) -> int:
        """One multiply-add a stored floating-point number."""
        return self.rows.numel() + self.mix.numel()

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m): the kept outputs, then the others from them."""
        kept = x @ self.rows.mT
        both = torch.cat([kept, kept @ self.mix.mT], dim=-1)
        return both.gather(-1, self.order.long().expand_as(both))  # index_select is slow in bfloat16

    def dense(self) -> Tensor:
        """(m, n)."""
        return torch.cat([self.rows, self.mix @ self.rows]).index_select(0, self.order)

    def adjoint(self, y: Tensor) -> Tensor:
        """(..., m) -> (..., n): gather the others onto the kept rows first."""
        sorted_y = y.index_select(-1, self.order.argsort())
        kept, others = sorted_y.split([self.rank, self.shape[0] - self.rank], dim=-1)
        return (kept + others @ self.mix) @ self.rows

    def check(self) -> None:
        """Raise unless the order is a permutation."""
        check_permutation(self.order)

    def spec(self) -> dict[str, Any]:
        """Kind, shape and rank."""
        return {"kind": "PivotedLowRank", "shape": list(self.shape), "rank": self.rank}

    @classmethod
    def empty(cls, spec: Mapping[str, Any], **where: Any) -> Self:
        """Rows and combinations of the spec's sizes, not initialised."""
        m, n = shape_of(spec)
        r = size(spec, "rank", largest=min(m, n))
        order = torch.arange(m, dtype=torch.int32, device=where.get("device"))
        return cls(torch.empty(r, n, **where), torch.empty(m - r, r, **where), order)
