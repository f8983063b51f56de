"""A matrix most of whose entries are zero."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..linalg import pack, packed_bytes, spread, unpack
from .base import StructuredMatrix, check_2d, shape_of, size


class Sparse(StructuredMatrix):
    """The entries that are not zero, row by row, and a bitmap of where they stand.

    The bitmap counts as one number for 16 of its bits. Applying the matrix writes it out: sparse storage saves
    memory, not time.

    Args:
        values: (k,), in the order of the rows.
        bitmap: (m, ceil(n / 8)) uint8, from :func:`rankwise.linalg.pack`.
        columns: n.

    >>> import torch
    >>> Sparse.from_dense(torch.tensor([[0.0, 2.0], [3.0, 0.0]])).values.tolist()
    [2.0, 3.0]
    """

    bitmap: Tensor

    def __init__(self, values: Tensor, bitmap: Tensor, columns: int) -> None:
        super().__init__()
        if values.dim() != 1 or not values.is_floating_point():
            raise TypeError(
                f"values must be (k,) floating-point numbers, got {values.dtype} {tuple(values.shape)}."
            )
        if bitmap.dtype != torch.uint8 or bitmap.dim() != 2 or bitmap.shape[1] != packed_bytes(columns, 1):
            raise ValueError(
                f"bitmap must be (m, {packed_bytes(columns, 1)}) uint8 for {columns} columns, got {bitmap.dtype} "
                f"{tuple(bitmap.shape)}."
            )
        self.values = nn.Parameter(values)
        self.register_buffer("bitmap", bitmap)
        self.shape = (len(bitmap), columns)

    @classmethod
    def from_dense(cls, matrix: Tensor, mask: Tensor | None = None) -> Self:
        """Keep the entries of an (m, n) matrix where ``mask`` is true, or those that are not zero."""
        check_2d("matrix", matrix)
        mask = matrix != 0 if mask is None else mask
        return cls(matrix[mask], pack(mask, 1), matrix.shape[1])

    @staticmethod
    def stored(m: int, n: int, kept: Tensor) -> tuple[Tensor, Tensor]:
        """How many floating-point numbers and how many bytes of the bitmap ``kept`` entries take."""
        return kept, torch.full_like(kept, m * packed_bytes(n, 1))

    @property
    def params(self) -> int:
        """The kept entries, and a number for 16 bits of the bitmap."""
        return self.values.numel() + -(-self.bitmap.numel() // 2)

    @property
    def macs(self) -> int:
        """One multiply-add a kept entry, for who skips the zeros; writing out takes m n."""
        return self.values.numel()

    def mask(self) -> Tensor:
        """(m, n) bool: where the kept entries stand."""
        return unpack(self.bitmap, 1).bool()[:, : self.shape[1]]

    def chunk(self, count: int, axis: int = 0) -> list[Self]:
        """Cut into as many equal matrices, below (axis 0) or beside each other."""
        values, masks = self.dense().detach().chunk(count, axis), self.mask().chunk(count, axis)
        return [self.from_dense(*each) for each in zip(values, masks, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        return x @ self.dense().mT

    def dense(self) -> Tensor:
        """(m, n)."""
        if torch.is_grad_enabled() and self.values.requires_grad:
            return self.values.new_zeros(self.shape).masked_scatter(self.mask(), self.values)
        return spread(self.values, self.bitmap)[:, : self.shape[1]]

    def check(self) -> None:
        """Raise unless the bitmap marks as many entries as there are values."""
        marked = int(self.mask().sum())
        if marked != len(self.values) or marked != int(unpack(self.bitmap, 1).bool().sum()):
            raise ValueError(
                f"the bitmap marks {marked} entries but {len(self.values)} are stored; it is damaged."
            )

    def spec(self) -> dict[str, Any]:
        """Kind, shape, and how many entries are kept."""
        return {"kind": "Sparse", "shape": list(self.shape), "kept": self.values.numel()}

    @classmethod
    def empty(cls, spec: Mapping[str, Any], **where: Any) -> Self:
        """The spec's number of entries, not initialised, at the first places."""
        m, n = shape_of(spec)
        kept = size(spec, "kept", least=0, largest=m * n)
        values = torch.empty(kept, **where)
        with torch.device("cpu"):  # the bitmap has values, also where a model is built without any
            bitmap = pack((torch.arange(m * n) < kept).view(m, n), 1)
        return cls(values, bitmap.to(values.device), n)
