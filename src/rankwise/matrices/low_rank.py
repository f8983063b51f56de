"""Low-rank matrices in two gauges: two factors, or some of the rows or columns and how they make the others."""

from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..linalg import interpolative_rows
from .base import StructuredMatrix, check_2d, check_permutation, check_rank, shape_of, size

Side = Literal["rows", "columns"]


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

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (m, r) and (r, n) factors."""
        return self.left, self.right

    def refitted(self, left: Tensor, right: Tensor) -> "LowRank":
        """Return a matrix of the same form and type with the values of other (m, r) and (r, n) factors."""
        return LowRank.from_factors(left, right).to(self.dtype)

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

    def lookup(self, index: Tensor) -> Tensor:
        """(...) -> (..., m) through r coordinates."""
        return functional.embedding(index, self.right.mT) @ self.left.mT

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
    """A rank-r matrix as r of its rows and how they make the others, or the same with columns.

    A rank-r (m, n) matrix has r (m + n - r) degrees of freedom; this gauge stores exactly so many
    numbers, and one int32 permutation, and applies them with as many multiply-adds. Lines are rows where
    ``side`` is "rows", and columns where it is "columns"; the shorter permutation is the cheaper one.

    Args:
        kept: (r, n) rows, or the transpose (r, m) of r columns.
        mix: (m - r, r) or (n - r, r), the other lines in terms of the kept ones.
        order: (m,) or (n,) int32, which line of the matrix each line of ``[kept; mix @ kept]`` is.
        side: "rows" or "columns".

    References: the interpolative decomposition (Cheng, Gimbutas, Martinsson, Rokhlin, 2005); as a way to
        store compressed layers, with rows, PIFA, arXiv 2501.19090.

    >>> import torch
    >>> a, b = torch.randn(6, 2), torch.randn(2, 5)
    >>> matrix = PivotedLowRank.from_factors(a, b)
    >>> bool(torch.allclose(matrix.dense(), a @ b, atol=1e-5)), sum(p.numel() for p in matrix.parameters())
    (True, 18)
    """

    order: Tensor
    side: Side

    def __init__(self, kept: Tensor, mix: Tensor, order: Tensor, side: Side = "rows") -> None:
        super().__init__()
        check_2d("kept", kept)
        check_2d("mix", mix)
        if mix.shape[1] != kept.shape[0]:
            raise ValueError(f"kept (r, k) and mix (l - r, r) disagree: {tuple(kept.shape)}, {tuple(mix.shape)}.")
        lines = kept.shape[0] + mix.shape[0]
        check_rank(kept.shape[0], lines, kept.shape[1])
        if order.shape != (lines,):
            raise ValueError(f"order must have shape ({lines},), got {tuple(order.shape)}.")
        self.kept, self.mix, self.side = nn.Parameter(kept), nn.Parameter(mix), _checked(side)
        self.register_buffer("order", order.to(torch.int32))
        self.shape = (lines, kept.shape[1]) if side == "rows" else (kept.shape[1], lines)

    @classmethod
    def from_factors(cls, left: Tensor, right: Tensor, side: Side | None = None) -> Self:
        """Choose r independent lines of ``left @ right`` such that the other combinations stay small.

        Unless a side is given, these are columns where there are at most as many columns as rows.
        """
        side = side or _shorter(left.shape[0], right.shape[1])
        tall, wide = (left, right) if side == "rows" else (right.mT, left.mT)
        kept, others, mix = interpolative_rows(tall)
        return cls(tall[kept] @ wide, mix, torch.cat([kept, others]), side)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (m, r) and (r, n) factors, one of them the kept lines."""
        one = torch.eye(self.rank, dtype=self.mix.dtype, device=self.mix.device)
        combinations = torch.cat([one, self.mix])[self.order.argsort()]
        return (combinations, self.kept) if self.side == "rows" else (self.kept.mT, combinations.mT)

    def refitted(self, left: Tensor, right: Tensor) -> "PivotedLowRank":
        """Return a matrix of the same form and type with the values of (m, r) and (r, n) factors."""
        return PivotedLowRank.from_factors(left, right, self.side).to(self.dtype)

    @staticmethod
    def stored(m: int, n: int, r: Tensor) -> tuple[Tensor, Tensor]:
        """How many floating-point numbers and how many int32 indices rank r takes."""
        return r * (m + n - r), torch.full_like(r, min(m, n))

    @property
    def rank(self) -> int:
        """How many lines are kept."""
        return self.kept.shape[0]

    @property
    def macs(self) -> int:
        """One multiply-add a stored floating-point number."""
        return self.kept.numel() + self.mix.numel()

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m) through r coordinates."""
        return self._to_lines(x) if self.side == "rows" else self._from_lines(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """(..., m) -> (..., n) through r coordinates."""
        return self._from_lines(y) if self.side == "rows" else self._to_lines(y)

    def dense(self) -> Tensor:
        """(m, n)."""
        lines = torch.cat([self.kept, self.mix @ self.kept])[self.order.argsort()]
        return lines if self.side == "rows" else lines.mT

    def check(self) -> None:
        """Raise unless the order is a permutation."""
        check_permutation(self.order)

    def spec(self) -> dict[str, Any]:
        """Kind, shape, rank and side."""
        return {"kind": "PivotedLowRank", "shape": list(self.shape), "rank": self.rank, "side": self.side}

    @classmethod
    def empty(cls, spec: Mapping[str, Any], **where: Any) -> Self:
        """Lines and combinations of the spec's sizes, not initialised."""
        m, n = shape_of(spec)
        r = size(spec, "rank", largest=min(m, n))
        side = _checked(spec.get("side"))
        lines, length = (m, n) if side == "rows" else (n, m)
        order = torch.arange(lines, dtype=torch.int32, device=where.get("device"))
        return cls(torch.empty(r, length, **where), torch.empty(lines - r, r, **where), order, side)

    def _to_lines(self, x: Tensor) -> Tensor:
        """Multiply by every line: the kept ones first, then the others from these."""
        kept = x @ self.kept.mT
        both = torch.cat([kept, kept @ self.mix.mT], dim=-1)
        return torch.empty_like(both).scatter(-1, self.order.long().expand_as(both), both)

    def _from_lines(self, y: Tensor) -> Tensor:
        """Combine the lines: the others' coefficients onto the kept lines first."""
        both = y.gather(-1, self.order.long().expand_as(y))  # index_select is slow in bfloat16
        kept, others = both.split([self.rank, self.mix.shape[0]], dim=-1)
        return (kept + others @ self.mix) @ self.kept


def _shorter(m: int, n: int) -> Side:
    return "rows" if m < n else "columns"


def _checked(side: Any) -> Side:
    if side not in get_args(Side):
        raise ValueError(f"the side of a PivotedLowRank must be 'rows' or 'columns', got {side!r}.")
    return side
