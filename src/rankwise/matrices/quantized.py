"""A matrix of small integers, with a scale and an offset for each group of neighbours in a row."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..linalg import pack, packed_bytes, unpack
from .base import StructuredMatrix, check_2d, shape_of, size

BITS = range(1, 9)


class Quantized(StructuredMatrix):
    """Integers of 1 to 8 bits as ``scale * code + offset``, both shared by a group of columns of a row.

    Args:
        packed: (m, ceil(n / 8) * bits) uint8, from :func:`rankwise.linalg.pack`.
        scale: (m, ceil(n / group)).
        offset: like ``scale``.
        columns: n.
        bits: of a code.
        group: how many columns share a scale.

    >>> import torch
    >>> codes = torch.tensor([[0, 1, 2, 3]])
    >>> scale, offset = torch.tensor([[0.5]]), torch.tensor([[-1.0]])
    >>> Quantized.from_codes(codes, scale, offset, bits=2, group=4).dense().tolist()
    [[-1.0, -0.5, 0.0, 0.5]]
    """

    packed: Tensor

    def __init__(
        self, packed: Tensor, scale: Tensor, offset: Tensor, *, columns: int, bits: int, group: int
    ) -> None:
        super().__init__()
        check_2d("scale", scale)
        check_2d("offset", offset)
        if bits not in BITS or group < 1 or columns < 1:
            raise ValueError(f"bits must be 1 ... 8, group and columns >= 1, got {bits}, {group}, {columns}.")
        m = len(packed)
        shapes = (m, packed_bytes(columns, bits)), (m, -(-columns // group))
        if packed.dtype != torch.uint8 or (packed.shape, scale.shape, offset.shape) != (*shapes, shapes[1]):
            raise ValueError(
                f"{bits}-bit codes of {columns} columns in groups of {group} need uint8 codes {shapes[0]}, and "
                f"scale and offset {shapes[1]}; got {tuple(packed.shape)}, {tuple(scale.shape)}, "
                f"{tuple(offset.shape)}."
            )
        self.register_buffer("packed", packed)
        self.scale, self.offset = nn.Parameter(scale), nn.Parameter(offset)
        self.bits, self.group, self.shape = bits, group, (m, columns)

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, offset: Tensor, *, bits: int, group: int) -> Self:
        """Pack (m, n) integers in 0 ... 2**bits - 1."""
        return cls(pack(codes, bits), scale, offset, columns=codes.shape[1], bits=bits, group=group)

    @staticmethod
    def stored(m: int, n: int, bits: int, group: int) -> tuple[int, int]:
        """How many floating-point numbers and how many bytes of codes are stored."""
        return 2 * m * -(-n // group), m * packed_bytes(n, bits)

    @property
    def params(self) -> int:
        """All m n numbers, however few bits they have, and the scales and offsets."""
        return self.shape[0] * self.shape[1] + self.scale.numel() + self.offset.numel()

    @property
    def macs(self) -> int:
        """Those of the dense matrix."""
        return self.shape[0] * self.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m), by the dense matrix."""
        return x @ self.dense().mT

    def dense(self) -> Tensor:
        """(m, n)."""
        m, n = self.shape
        codes = nn.functional.pad(unpack(self.packed, self.bits)[:, :n], (0, -n % self.group))
        wide = torch.promote_types(self.scale.dtype, torch.float32)  # rounded once, in the end
        scale, offset = self.scale[:, :, None].to(wide), self.offset[:, :, None].to(wide)
        written = codes.view(m, -1, self.group).to(wide) * scale + offset
        return written.flatten(1)[:, :n].to(self.scale.dtype)

    def spec(self) -> dict[str, Any]:
        """Kind, shape, bits and group."""
        return {"kind": "Quantized", "shape": list(self.shape), "bits": self.bits, "group": self.group}

    @classmethod
    def empty(cls, spec: Mapping[str, Any], **where: Any) -> Self:
        """Codes that are zero, and scales and offsets that are not initialised."""
        m, n = shape_of(spec)
        bits, group = size(spec, "bits", largest=BITS[-1]), size(spec, "group")
        packed = torch.zeros(m, packed_bytes(n, bits), dtype=torch.uint8, device=where.get("device"))
        scale, offset = (torch.empty(m, -(-n // group), **where) for _ in range(2))
        return cls(packed, scale, offset, columns=n, bits=bits, group=group)
