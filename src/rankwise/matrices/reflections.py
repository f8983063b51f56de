"""An orthogonal matrix as a product of reflections."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from .base import StructuredMatrix, check_2d, size, without_autocast


class Reflections(StructuredMatrix):
    """The (n, n) matrix H_1 H_2 ... H_r with H_i = I - 2 v_i v_i' / |v_i|^2, orthogonal for all vectors.

    It is applied as I - U' T U, where U (r, n) holds the vectors at length one, and T is the inverse of the upper
    triangle of U U' with its diagonal halved (the compact WY form): two products of thin matrices for all
    reflections, and gradients without a sequence. T is found in float32 or wider, also under autocast. The
    transpose is the inverse.

    Lengths of vectors do not matter to the matrix, but gradients are inversely proportional to them. A vector of
    zeros reflects nothing.

    Args:
        vectors: (r, n), at least one.

    References: Schreiber, Van Loan, "A storage-efficient WY representation", 1989; Joffrain et al.,
        "Accumulating Householder transformations, revisited", 2006, for T as an inverse.

    >>> import torch
    >>> Reflections(torch.tensor([[3.0, 0.0]])).dense().tolist()
    [[-1.0, 0.0], [0.0, 1.0]]
    """

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        check_2d("vectors", vectors)
        if not len(vectors):
            raise ValueError("Reflections needs at least one vector.")
        self.vectors = nn.Parameter(vectors)
        self.shape = (vectors.shape[1], vectors.shape[1])

    @property
    def macs(self) -> int:
        """Those of U, T and U'; finding T is not counted."""
        count, n = self.vectors.shape
        return 2 * count * n + count**2

    def factors(self) -> tuple[Tensor, Tensor]:
        """U (r, n) and T (r, r) of I - U' T U, in float32 or wider."""
        with without_autocast(self.vectors.device):
            vectors = self.vectors.to(torch.promote_types(self.dtype, torch.float32))
            largest = vectors.detach().abs().amax(1, keepdim=True)  # divided by: squares stay in range
            unit = functional.normalize(vectors / largest.where(largest > 0, 1), dim=1)
            one = torch.eye(len(unit), dtype=unit.dtype, device=unit.device)
            return unit, torch.linalg.solve_triangular((unit @ unit.mT).triu(1) + one / 2, one, upper=True)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., n)."""
        unit, inner = (factor.to(self.dtype) for factor in self.factors())
        return (x - x @ unit.mT @ inner.mT @ unit).to(x.dtype)

    def adjoint(self, y: Tensor) -> Tensor:
        """(..., n) -> (..., n), by the inverse."""
        unit, inner = (factor.to(self.dtype) for factor in self.factors())
        return (y - y @ unit.mT @ inner @ unit).to(y.dtype)

    def lookup(self, index: Tensor) -> Tensor:
        """(...) -> (..., n)."""
        return self(functional.one_hot(index, self.shape[0]).to(self.dtype))

    def lookup_through(self, left: StructuredMatrix, index: Tensor) -> Tensor:
        """(...) -> (..., m) for an (m, n) ``left``: its columns less those of (left U') T U, rounded once."""
        unit, inner = self.factors()
        columns = left.lookup(index)
        turned = left(unit.to(columns.dtype)).to(unit.dtype)  # (r, m)
        return (columns - functional.embedding(index, unit.mT) @ inner.mT @ turned).to(columns.dtype)

    def dense(self) -> Tensor:
        """(n, n)."""
        unit, inner = self.factors()
        one = torch.eye(self.shape[0], dtype=unit.dtype, device=unit.device)
        return (one - unit.mT @ inner @ unit).to(self.dtype)

    def spec(self) -> dict[str, Any]:
        """Kind, size, and how many reflections."""
        return {"kind": "Reflections", "size": self.shape[0], "count": len(self.vectors)}

    @classmethod
    def empty(cls, spec: Mapping[str, Any], **where: Any) -> Self:
        """Vectors of the spec's sizes, not initialised."""
        return cls(torch.empty(size(spec, "count"), size(spec, "size"), **where))
