"""Matrices that do not train: the one that an adapter changes, and parts of the adapter itself."""

from torch import Tensor

from .base import StructuredMatrix
from .wrapper import Wrapper


class _Untrained(Wrapper):
    """Another matrix, whose parameters ask for no gradients."""

    def __init__(self, matrix: StructuredMatrix) -> None:
        super().__init__(matrix)
        self.requires_grad_(False)

    def affine(self, x: Tensor, bias: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        return self.matrix.affine(x, bias)


class Base(_Untrained):
    """The matrix that an adapter changes: it does not train, and is not written with the adapter.

    Args:
        matrix: (m, n), of any kind.

    >>> import torch
    >>> from rankwise.matrices import Dense
    >>> [p.requires_grad for p in Base(Dense(torch.eye(2))).parameters()]
    [False]
    """


def put_base(expression: StructuredMatrix, matrix: StructuredMatrix) -> None:
    """Have all bases in an expression stand around one matrix."""
    for part in list(expression.modules()):
        if isinstance(part, Base):
            part.matrix = matrix


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
