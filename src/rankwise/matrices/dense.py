"""A matrix written out."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from .base import StructuredMatrix, autocast_of, check_2d, shape_of


class Dense(StructuredMatrix):
    """A matrix without structure, m n numbers.

    Args:
        weight: (m, n).

    >>> import torch
    >>> Dense(torch.eye(2))(torch.tensor([1.0, 2.0])).tolist()
    [1.0, 2.0]
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        check_2d("weight", weight)
        self.weight = nn.Parameter(weight)
        self.shape = (weight.shape[0], weight.shape[1])

    @property
    def macs(self) -> int:
        """One multiply-add a stored number."""
        return self.weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        return self._linear(x, None)

    def affine(self, x: Tensor, bias: Tensor) -> Tensor:
        """(..., n) -> (..., m), with the bits of ``nn.Linear``."""
        return self._linear(x, bias)

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        casts = autocast_of(x.device) is not None and not torch.compiler.is_compiling()
        if casts and x.requires_grad and not self.weight.requires_grad:
            return _Recast.apply(x, self.weight, bias)
        return functional.linear(x, self.weight, bias)

    def dense(self) -> Tensor:
        """(m, n)."""
        return self.weight

    def spec(self) -> dict[str, Any]:
        """Kind and shape."""
        return {"kind": "Dense", "shape": list(self.shape)}

    @classmethod
    def empty(cls, spec: Mapping[str, Any], **where: Any) -> Self:
        """A weight of the spec's shape, not initialised."""
        return cls(torch.empty(shape_of(spec), **where))


class _Recast(torch.autograd.Function):
    """``linear`` with a weight that does not train: under autocast its short copy is not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor | None]:
        (dy,), (weight,), (of_x, of_bias) = gradients, ctx.saved_tensors, ctx.dtypes
        slope = dy.reshape(-1, dy.shape[-1]).sum(0).to(of_bias) if ctx.needs_input_grad[2] else None
        return (dy @ weight.to(dy.dtype)).to(of_x), None, slope
