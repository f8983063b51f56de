"""The Kronecker product of structured matrices."""

import math

import torch
from torch import Tensor

from .base import StructuredMatrix
from .expressions import Expression


class Kronecker(Expression):
    """The Kronecker product of matrices, applied mode by mode and never written out for it.

    The last axis of an input is seen as a tensor with one axis (mode) for each matrix, row-major, and every
    matrix is applied along its own. Entry ((i_1, i_2), (j_1, j_2)) is the product of the entries (i_1, j_1) and
    (i_2, j_2), as in ``torch.kron``.

    Args:
        factors: at least one; (m_a, n_a) make an (m_1 m_2 ..., n_1 n_2 ...) matrix.

    >>> import torch
    >>> from rankwise.matrices import Dense, Diagonal
    >>> Kronecker(Dense(torch.ones(1, 2)), Diagonal(torch.tensor([2.0, 3.0]))).dense().tolist()
    [[2.0, 0.0, 2.0, 0.0], [0.0, 3.0, 0.0, 3.0]]
    """

    def __init__(self, *factors: StructuredMatrix) -> None:
        super().__init__(*factors)
        self.shape = (math.prod(f.shape[0] for f in factors), math.prod(f.shape[1] for f in factors))

    @property
    def rank(self) -> int:
        """The product of the ranks of the factors."""
        return math.prod(part.rank for part in self.parts)

    @property
    def macs(self) -> int:
        """Those of each factor for every vector along its mode."""
        done, left, total = 1, self.shape[1], 0
        for part in self.parts:
            left //= part.shape[1]
            total += done * left * part.macs
            done *= part.shape[0]
        return total

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m), the first mode first."""
        x = x.unflatten(-1, [part.shape[1] for part in self.parts])
        for axis, part in enumerate(self.parts, -len(self.parts)):
            x = part(x.movedim(axis, -1)).movedim(-1, axis)
        return x.flatten(-len(self.parts))

    def adjoint(self, y: Tensor) -> Tensor:
        """(..., m) -> (..., n)."""
        y = y.unflatten(-1, [part.shape[0] for part in self.parts])
        for axis, part in enumerate(self.parts, -len(self.parts)):
            y = part.adjoint(y.movedim(axis, -1)).movedim(-1, axis)
        return y.flatten(-len(self.parts))

    def lookup(self, index: Tensor) -> Tensor:
        """(...) -> (..., m): products of the factors' columns, rounded once."""
        *others, last = self.parts
        found, index = last.lookup(index % last.shape[1]), index // last.shape[1]
        for part in reversed(others):
            column, index = part.lookup(index % part.shape[1]), index // part.shape[1]
            found = (column[..., None] * found[..., None, :]).flatten(-2)  # torch takes the wider type
        return found.to(self.dtype)

    def dense(self) -> Tensor:
        """(m, n), multiplied in the widest type of the factors and rounded once."""
        first, *others = (part.dense() for part in self.parts)
        for part in others:
            first = torch.kron(first, part)  # torch takes the wider type
        return first.to(self.dtype)
