"""A square matrix that reorders coordinates."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from .base import StructuredMatrix, check_permutation, size


class Permutation(StructuredMatrix):
    """The (m, m) matrix that turns x into ``x[..., order]``; it stores int32 indices and no other number.

    Args:
        order: (m,) integers, each of 0 ... m - 1 once.

    >>> import torch
    >>> Permutation(torch.tensor([2, 0, 1]))(torch.tensor([5.0, 6.0, 7.0])).tolist()
    [7.0, 5.0, 6.0]
    """

    order: Tensor

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        if order.dim() != 1 or order.is_floating_point() or order.dtype == torch.bool:
            raise TypeError(f"order must be a 1-D integer tensor, got {order.dtype} {tuple(order.shape)}.")
        m = len(order)
        self.register_buffer("order", order.to(torch.int32))
        self.shape = (m, m)
        if not order.is_meta:
            self.check()

    @property
    def macs(self) -> int:
        """Nothing is multiplied."""
        return 0

    def forward(self, x: Tensor) -> Tensor:
        """(..., m) -> (..., m)."""
        return x.index_select(-1, self.order)

    def adjoint(self, y: Tensor) -> Tensor:
        """The inverse: put every coordinate back."""
        return y.index_select(-1, self.order.argsort())

    def dense(self) -> Tensor:
        """(m, m) zeros and ones, in torch's default type."""
        return torch.eye(len(self.order), device=self.order.device).index_select(0, self.order)

    def check(self) -> None:
        """Raise unless the order is a permutation."""
        check_permutation(self.order)

    def spec(self) -> dict[str, Any]:
        """Kind and size."""
        return {"kind": "Permutation", "size": len(self.order)}

    @classmethod
    def empty(cls, spec: Mapping[str, Any], **where: Any) -> Self:
        """The identity of the spec's size; the type of floating-point tensors does not matter."""
        return cls(torch.arange(size(spec, "size"), device=where.get("device")))
