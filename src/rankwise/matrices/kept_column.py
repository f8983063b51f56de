"""A changed matrix of which one column does not change."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from .base import StructuredMatrix
from .frozen import Base
from .wrapper import Wrapper


class KeptColumn(Wrapper):
    """A matrix with a base in it, but for one column, which is the base's; no gradient reaches that column.

    ``nn.Embedding`` does not train the vector of its padding token; neither does what stands in its place.

    Args:
        matrix: (m, n), with a :class:`Base` in it.
        column: from 0 to n - 1.

    >>> import torch
    >>> from rankwise.matrices import Dense, Diagonal, Product
    >>> KeptColumn(Product(Base(Dense(torch.eye(2))), Diagonal(torch.tensor([2.0, 3.0]))), 0).dense().tolist()
    [[1.0, 0.0], [0.0, 3.0]]
    """

    def __init__(self, matrix: StructuredMatrix, column: int) -> None:
        super().__init__(matrix)
        if isinstance(column, bool) or not isinstance(column, int) or not 0 <= column < matrix.shape[1]:
            raise ValueError(f"column must be an integer from 0 to {matrix.shape[1] - 1}, got {column!r}.")
        if not any(isinstance(part, Base) for part in matrix.modules()):
            raise ValueError("KeptColumn takes a matrix with a Base in it, whose column is kept.")
        self.column = column

    @property
    def base(self) -> Base:
        """What the column is of."""
        return next(part for part in self.matrix.modules() if isinstance(part, Base))

    @property
    def rank(self) -> int:
        """One more than that of the matrix, as far as the shape allows."""
        return min(*self.shape, self.matrix.rank + 1)

    @property
    def macs(self) -> int:
        """Those of the matrix, and of the column."""
        return self.matrix.macs + self.shape[0]

    def _index(self, like: Tensor) -> Tensor:
        return torch.full((1,), self.column, device=like.device)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        index = self._index(x)
        kept = x.index_select(-1, index) * self.base.lookup(index)[0]
        return self.matrix(x.index_fill(-1, index, 0)) + kept

    def adjoint(self, y: Tensor) -> Tensor:
        """(..., m) -> (..., n)."""
        index = self._index(y)
        kept = y @ self.base.lookup(index).mT
        return self.matrix.adjoint(y).index_copy(-1, index, kept)

    def lookup(self, index: Tensor) -> Tensor:
        """(...) -> (..., m)."""
        kept = self.base.lookup(self._index(index))[0]
        return torch.where((index == self.column)[..., None], kept, self.matrix.lookup(index))

    def dense(self) -> Tensor:
        """(m, n)."""
        dense = self.matrix.dense()
        index = self._index(dense)
        return dense.index_copy(1, index, self.base.lookup(index).mT)

    def spec(self) -> dict[str, Any]:
        """Kind, column, and the spec of the matrix."""
        return {**super().spec(), "column": self.column}

    @classmethod
    def empty(cls, spec: Mapping[str, Any], **where: Any) -> Self:
        """The same around a matrix that is not initialised."""
        from . import from_spec

        column: Any = spec.get("column")
        return cls(from_spec(spec.get("matrix"), **where), column)
