"""What matrices that stand around another one have in common."""

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor

from .base import StructuredMatrix


class Wrapper(StructuredMatrix):
    """Another matrix, with the same values.

    Args:
        matrix: (m, n), of any kind.
    """

    def __init__(self, matrix: StructuredMatrix) -> None:
        super().__init__()
        if not isinstance(matrix, StructuredMatrix):
            raise TypeError(f"{type(self).__name__} takes a StructuredMatrix, got {type(matrix).__name__}.")
        self.matrix, self.shape = matrix, matrix.shape

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
