"""Sums of Kronecker products of small dense matrices and low-rank blocks."""

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from .base import StructuredMatrix, shape_of, size


class Hypercomplex(StructuredMatrix):
    """The (m, n) matrix sum_i A_i x (S_i T_i), x the Kronecker product, with k matrices A_i (k, k).

    It multiplies by T_i, mixes by A_i and multiplies by S_i, and is never written out for it. With k = 4 and the
    right A_i it is a matrix of quaternions. Published code stores the transpose, for row vectors: its A_i and
    its S_i T_i are both transposed.

    Args:
        mixers: A, (k, k, k): which, row, column. An ``nn.Parameter`` stays the same object, so that several
            matrices can share it.
        left: S, (k, m / k, r).
        right: T, (k, r, n / k).

    References: Zhang et al., "Beyond fully-connected layers with quaternions" (PHM), ICLR 2021,
        arXiv 2102.08597; Karimi Mahabadi, Henderson, Ruder, "Compacter", NeurIPS 2021, arXiv 2106.04647, for
        blocks of low rank.

    >>> import torch
    >>> Hypercomplex(torch.eye(2).expand(2, 2, 2), torch.ones(2, 3, 1), torch.ones(2, 1, 2)).dense()[0].tolist()
    [2.0, 2.0, 0.0, 0.0]
    """

    def __init__(self, mixers: Tensor, left: Tensor, right: Tensor) -> None:
        super().__init__()
        count, rank = len(left), left.shape[-1]
        fits = left.dim() == right.dim() == 3 and right.shape[:2] == (count, rank)
        if not fits or mixers.shape != (count, count, count):
            raise ValueError(
                f"mixers (k, k, k), left (k, m / k, r) and right (k, r, n / k) disagree: {tuple(mixers.shape)}, "
                f"{tuple(left.shape)}, {tuple(right.shape)}."
            )
        self.mixers = mixers if isinstance(mixers, nn.Parameter) else nn.Parameter(mixers)
        self.left, self.right = nn.Parameter(left), nn.Parameter(right)
        self.shape = (count * left.shape[1], count * right.shape[2])

    @property
    def rank(self) -> int:
        """At most k^2 r."""
        count, _, rank = self.left.shape
        return min(*self.shape, count**2 * rank)

    @property
    def macs(self) -> int:
        """Those of T, A and S: k r (m + n) + k^3 r."""
        count, _, rank = self.left.shape
        return count * rank * sum(self.shape) + count**3 * rank

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        count = len(self.mixers)
        inner = torch.einsum("...bn,irn->...bir", x.unflatten(-1, (count, -1)), self.right)
        mixed = torch.einsum("...bir,iab->...air", inner, self.mixers)
        return torch.einsum("...air,imr->...am", mixed, self.left).flatten(-2)

    def adjoint(self, y: Tensor) -> Tensor:
        """(..., m) -> (..., n)."""
        count = len(self.mixers)
        inner = torch.einsum("...am,imr->...air", y.unflatten(-1, (count, -1)), self.left)
        mixed = torch.einsum("...air,iab->...bir", inner, self.mixers)
        return torch.einsum("...bir,irn->...bn", mixed, self.right).flatten(-2)

    def lookup(self, index: Tensor) -> Tensor:
        """(...) -> (..., m), from the columns of T and of A."""
        length = self.right.shape[2]
        inner = functional.embedding(index % length, self.right.permute(2, 0, 1).flatten(1))
        mixers = functional.embedding(index // length, self.mixers.permute(2, 0, 1).flatten(1))
        inner, mixers = (each.unflatten(-1, (len(self.mixers), -1)) for each in (inner, mixers))
        return torch.einsum("...ir,...ia,imr->...am", inner, mixers, self.left).flatten(-2)

    def dense(self) -> Tensor:
        """(m, n)."""
        return torch.einsum("iab,imn->ambn", self.mixers, self.left @ self.right).reshape(self.shape)

    def spec(self) -> dict[str, Any]:
        """Kind, shape, count k of terms, and rank r of a block."""
        count, _, rank = self.left.shape
        return {"kind": "Hypercomplex", "shape": list(self.shape), "count": count, "block_rank": rank}

    @classmethod
    def empty(cls, spec: Mapping[str, Any], **where: Any) -> Self:
        """Factors of the spec's sizes, not initialised."""
        m, n = shape_of(spec)
        count = size(spec, "count", largest=min(m, n))
        rank = size(spec, "block_rank", largest=min(m, n))
        if m % count or n % count:
            raise ValueError(f"spec of Hypercomplex: count {count} must divide both sizes of ({m}, {n}).")
        return cls(
            torch.empty(count, count, count, **where),
            torch.empty(count, m // count, rank, **where),
            torch.empty(count, rank, n // count, **where),
        )


def glorot(*sizes: int, generator: torch.Generator) -> Tensor:
    """Draw (k, a, b) numbers, uniform in +-sqrt(12 / (a + b)): Glorot's rule with a gain of sqrt(2)."""
    return (2 * torch.rand(sizes, generator=generator) - 1) * math.sqrt(12 / (sizes[-1] + sizes[-2]))
