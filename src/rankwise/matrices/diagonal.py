"""A square matrix that scales each coordinate."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from .base import StructuredMatrix, size


class Diagonal(StructuredMatrix):
    """The (n, n) matrix with these numbers on its diagonal and zeros elsewhere.

    Args:
        values: (n,).

    >>> import torch
    >>> Diagonal(torch.tensor([2.0, 3.0]))(torch.ones(2)).tolist()
    [2.0, 3.0]
    """

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        if values.dim() != 1 or not values.is_floating_point():
            raise TypeError(
                f"values must be a 1-D floating-point tensor, got {values.dtype} {tuple(values.shape)}."
            )
        self.values = nn.Parameter(values)
        self.shape = (len(values), len(values))

    @property
    def macs(self) -> int:
        """One multiplication a coordinate."""
        return self.values.numel()

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., n)."""
        return x * self.values

    def adjoint(self, y: Tensor) -> Tensor:
        """The same as forward: the matrix is symmetric."""
        return y * self.values

    def dense(self) -> Tensor:
        """(n, n)."""
        return self.values.diag()

    def spec(self) -> dict[str, Any]:
        """Kind and size."""
        return {"kind": "Diagonal", "size": len(self.values)}

    @classmethod
    def empty(cls, spec: Mapping[str, Any], **where: Any) -> Self:
        """Values of the spec's size, not initialised."""
        return cls(torch.empty(size(spec, "size"), **where))
