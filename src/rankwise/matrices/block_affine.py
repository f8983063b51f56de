"""A matrix whose square blocks go through affine maps, one for each row of blocks."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from .base import StructuredMatrix, as_given, size, widened
from .frozen import Base
from .recomputed import looked_up, product


class BlockAffine(StructuredMatrix):
    """W'_ij = W_ij + (W_ij + I) T_i for the (b, b) blocks W_ij of a frozen matrix W.

    W itself is applied as it is. The change is written out for every product and every lookup, in the type of T,
    and again for the gradient instead of being kept; gradients of gradients are not available. It has full rank
    in general.

    Args:
        base: W, (m, n), with m and n multiples of b.
        blocks: T, (m / b, b, b).

    >>> import torch
    >>> from rankwise.matrices import Dense
    >>> BlockAffine(Base(Dense(torch.eye(2))), torch.ones(2, 1, 1)).dense().tolist()
    [[3.0, 1.0], [1.0, 3.0]]
    """

    def __init__(self, base: Base, blocks: Tensor) -> None:
        super().__init__()
        if not isinstance(base, Base):
            raise TypeError(f"BlockAffine takes a Base, got {type(base).__name__}.")
        (m, n), length = base.shape, blocks.shape[-1]
        if length < 1 or m % length or n % length or blocks.shape != (m // length, length, length):
            raise ValueError(f"blocks of shape {tuple(blocks.shape)} do not fit a matrix of shape {base.shape}.")
        self.change = _Change(base, blocks)
        self.shape = base.shape

    @property
    def base(self) -> Base:
        """W."""
        return self.change.base

    @property
    def macs(self) -> int:
        """Those of the base, and those of the change once it is written out."""
        return self.base.macs + self.shape[0] * self.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        return self.base(x) + self._moved(x)

    def affine(self, x: Tensor, bias: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        return self.base.affine(x, bias) + self._moved(x)

    def added(self, x: Tensor, product: Tensor) -> Tensor:
        """(..., n), (..., m) -> (..., m)."""
        return self._moved(x)

    def _moved(self, x: Tensor) -> Tensor:
        return as_given(product(self.change, widened(x, self.change.blocks.dtype)), x)

    def adjoint(self, y: Tensor) -> Tensor:
        """(..., m) -> (..., n)."""
        return self.base.adjoint(y) + as_given(widened(y, self.change.blocks.dtype) @ self.change.dense(), y)

    def lookup(self, index: Tensor) -> Tensor:
        """(...) -> (..., m), rounded once to the type of the base."""
        return (self.base.lookup(index) + looked_up(self.change, index)).to(self.base.dtype)

    def dense(self) -> Tensor:
        """(m, n), rounded once to the type of the base."""
        return (self.base.dense() + self.change.dense()).to(self.base.dtype)

    def spec(self) -> dict[str, Any]:
        """Kind, length of a block, and the spec of the base."""
        return {"kind": "BlockAffine", "length": self.change.blocks.shape[-1], "base": self.base.spec()}

    @classmethod
    def empty(cls, spec: Mapping[str, Any], **where: Any) -> Self:
        """Blocks that are not initialised, around a base that is not either."""
        from . import from_spec

        base = from_spec(spec.get("base"), **where)
        if not isinstance(base, Base):
            raise ValueError(f"spec of {cls.__name__} needs 'base', a Base.")
        length = size(spec, "length", largest=min(base.shape))
        return cls(base, torch.empty(base.shape[0] // length, length, length, **where))


class _Change(nn.Module):
    """The blocks (W_ij + I) T_i."""

    def __init__(self, base: Base, blocks: Tensor) -> None:
        super().__init__()
        self.base, self.blocks = base, nn.Parameter(blocks)

    def lookup(self, index: Tensor) -> Tensor:
        """(...) -> (..., m), in the type of T; all is written out, since each column takes b of W's."""
        return functional.embedding(index, self.dense().mT)

    def dense(self) -> Tensor:
        """(m, n), in the type of T."""
        (m, n), length = self.base.shape, self.blocks.shape[-1]
        grid = self.base.dense().to(self.blocks.dtype).view(m // length, length, n // length, length)
        grid = grid + torch.eye(length).to(self.blocks)[:, None]
        return torch.einsum("iajk,ikb->iajb", grid, self.blocks).reshape(m, n)
