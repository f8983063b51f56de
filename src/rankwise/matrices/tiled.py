"""A small matrix repeated side by side and below itself."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from .base import StructuredMatrix, check_2d, shape_of, size


class Tiled(StructuredMatrix):
    """The (m, n) matrix with entries T[i mod p, j mod q] of a (p, q) tile; tiles at the edge are cut off.

    Applied to x, it adds the shards of q inputs that lie side by side, multiplies their sum by T, and repeats the
    p outputs.

    Args:
        tile: T, (p, q).
        shape: (m, n), with p <= m and q <= n.

    >>> import torch
    >>> Tiled(torch.tensor([[1.0, 2.0]]), (2, 3)).dense().tolist()
    [[1.0, 2.0, 1.0], [1.0, 2.0, 1.0]]
    """

    def __init__(self, tile: Tensor, shape: tuple[int, int]) -> None:
        super().__init__()
        check_2d("tile", tile)
        if any(part > whole or part < 1 for part, whole in zip(tile.shape, shape, strict=True)):
            raise ValueError(f"a tile of shape {tuple(tile.shape)} does not fit in a matrix of shape {shape}.")
        self.tile = nn.Parameter(tile)
        self.shape = (shape[0], shape[1])

    @property
    def rank(self) -> int:
        """The smaller side of the tile."""
        return min(self.tile.shape)

    @property
    def macs(self) -> int:
        """One multiply-add a stored number; the sums of shards are not counted."""
        return self.tile.numel()

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m) through the sum of the shards."""
        return _repeated(_shards_added(x, self.tile.shape[1]) @ self.tile.mT, self.shape[0])

    def adjoint(self, y: Tensor) -> Tensor:
        """(..., m) -> (..., n) in the same way."""
        return _repeated(_shards_added(y, self.tile.shape[0]) @ self.tile, self.shape[1])

    def lookup(self, index: Tensor) -> Tensor:
        """(...) -> (..., m), from the columns of the tile."""
        return _repeated(functional.embedding(index % self.tile.shape[1], self.tile.mT), self.shape[0])

    def dense(self) -> Tensor:
        """(m, n)."""
        return _repeated(_repeated(self.tile, self.shape[1]).mT, self.shape[0]).mT

    def spec(self) -> dict[str, Any]:
        """Kind, and the shapes of the matrix and of the tile."""
        return {
            "kind": "Tiled",
            "shape": list(self.shape),
            "rows": self.tile.shape[0],
            "columns": self.tile.shape[1],
        }

    @classmethod
    def empty(cls, spec: Mapping[str, Any], **where: Any) -> Self:
        """A tile of the spec's shape, not initialised."""
        m, n = shape_of(spec)
        return cls(torch.empty(size(spec, "rows", largest=m), size(spec, "columns", largest=n), **where), (m, n))


def _shards_added(x: Tensor, length: int) -> Tensor:
    """Cut the last axis into shards of a length, the last one filled up with zeros, and add them."""
    return functional.pad(x, (0, -x.shape[-1] % length)).unflatten(-1, (-1, length)).sum(-2)


def _repeated(x: Tensor, length: int) -> Tensor:
    """Repeat the last axis until it has a length."""
    count = -(-length // x.shape[-1])
    return x.repeat(*[1] * (x.dim() - 1), count)[..., :length]
