"""The trained side branch of an adapted layer."""

import math
from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor
from torch.nn import functional

from .base import StructuredMatrix, as_given, widened
from .wrapper import Wrapper


class Branch(Wrapper):
    """A fixed multiple of a matrix, computed in the matrix's own type, which may be wider than the input's.

    The result comes in the type of the input. Under autocast nothing is converted here.

    Args:
        matrix: (m, n).
        scale: a finite number; it is not trained.
        dropout: share of the inputs that are dropped while training, in [0, 1).

    >>> import torch
    >>> from rankwise.matrices import Dense
    >>> Branch(Dense(torch.eye(2)), 0.5)(torch.ones(2, dtype=torch.bfloat16))
    tensor([0.5000, 0.5000], dtype=torch.bfloat16, grad_fn=<ToCopyBackward0>)
    """

    def __init__(self, matrix: StructuredMatrix, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__(matrix)
        if not _is_number(scale):
            raise ValueError(f"scale must be a finite number, got {scale!r}.")
        if not _is_number(dropout) or not 0 <= dropout < 1:
            raise ValueError(f"dropout must be >= 0 and < 1, got {dropout!r}.")
        self.scale, self.dropout = float(scale), float(dropout)

    @property
    def macs(self) -> int:
        """Those of the matrix, and one multiplication an output."""
        return self.matrix.macs + self.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        if self.dropout:
            x = functional.dropout(x, self.dropout, self.training)
        return as_given(self.scale * self.matrix(widened(x, self.matrix.dtype)), x)

    def adjoint(self, y: Tensor) -> Tensor:
        """(..., m) -> (..., n), without dropout."""
        return as_given(self.scale * self.matrix.adjoint(widened(y, self.matrix.dtype)), y)

    def lookup(self, index: Tensor) -> Tensor:
        """(...) -> (..., m), in the matrix's own type and without dropout, which would drop whole tokens."""
        return self.scale * self.matrix.lookup(index)

    def lookup_through(self, left: StructuredMatrix, index: Tensor) -> Tensor:
        """(...) -> (..., rows of ``left``)."""
        return self.scale * self.matrix.lookup_through(left, index)

    def dense(self) -> Tensor:
        """(m, n)."""
        return self.scale * self.matrix.dense()

    def spec(self) -> dict[str, Any]:
        """Kind, scale, dropout, and the spec of the matrix."""
        return {**super().spec(), "scale": self.scale, "dropout": self.dropout}

    @classmethod
    def empty(cls, spec: Mapping[str, Any], **where: Any) -> Self:
        """The same around a matrix that is not initialised."""
        from . import from_spec

        return cls(from_spec(spec.get("matrix"), **where), spec.get("scale", math.nan), spec.get("dropout", 0.0))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
