"""Matrices that do not train: the one that an adapter changes, and parts of the adapter itself."""

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor

from .base import StructuredMatrix


class _Untrained(StructuredMatrix):
    """Another matrix, whose parameters ask for no gradients."""

    def __init__(self, matrix: StructuredMatrix) -> None:
        super().__init__()
        if not isinstance(matrix, StructuredMatrix):
            raise TypeError(f"{type(self).__name__} takes a StructuredMatrix, got {type(matrix).__name__}.")
        self.matrix, self.shape = matrix.requires_grad_(False), matrix.shape

    @property
    def rank(self) -> int:
        """The rank of the matrix."""
        return self.matrix.rank

    @property
    def params(self) -> int:
        """Those of the matrix."""
        return self.matrix.params

    @property
    def macs(self) -> int:
        """Those of the matrix."""
        return self.matrix.macs

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        return self.matrix(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """(..., m) -> (..., n)."""
        return self.matrix.adjoint(y)

    def lookup(self, index: Tensor) -> Tensor:
        """(...) -> (..., m)."""
        return self.matrix.lookup(index)

    def dense(self) -> Tensor:
        """(m, n)."""
        return self.matrix.dense()

    def spec(self) -> dict[str, Any]:
        """Kind, and the spec of the matrix."""
        return {"kind": type(self).__name__, "matrix": self.matrix.spec()}

    @classmethod
    def empty(cls, spec: Mapping[str, Any], **where: Any) -> Self:
        """The same around a matrix that is not initialised."""
        from . import from_spec

        return cls(from_spec(spec.get("matrix"), **where))


class Base(_Untrained):
    """The matrix that an adapter changes: it does not train, and is not written with the adapter.

    Args:
        matrix: (m, n), of any kind.

    >>> import torch
    >>> from rankwise.matrices import Dense
    >>> [p.requires_grad for p in Base(Dense(torch.eye(2))).parameters()]
    [False]
    """


class Frozen(_Untrained):
    """A part of an adapter that does not train but is written with it.

    Args:
        matrix: (m, n), of any kind.

    >>> import torch
    >>> from rankwise.matrices import Dense, Diagonal, Product
    >>> matrix = Product(Frozen(Dense(torch.eye(2))), Diagonal(torch.ones(2)))
    >>> [p.shape for p in matrix.parameters() if p.requires_grad]
    [torch.Size([2])]
    """
