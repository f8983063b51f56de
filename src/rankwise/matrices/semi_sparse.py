"""A matrix of which a fixed number of every few neighbouring entries is kept."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..linalg import largest_in_groups, pack, packed_bytes, unpack
from .base import StructuredMatrix, check_2d, shape_of, size


class SemiSparse(StructuredMatrix):
    """Of every ``group`` neighbouring entries of a row ``kept``, and where each stands in its group.

    With 2 of 4, the pattern of sparse tensor cores, a place takes two bits. 16 bits of places count as one
    number. Applying the matrix writes it out: without such hardware this saves memory, not time.

    Args:
        values: (m, n / group * kept), group by group.
        places: (m, :func:`rankwise.linalg.packed_bytes` of as many) uint8, from :func:`rankwise.linalg.pack`.
        kept: of each group.
        group: 2 ... 256 columns.

    >>> import torch
    >>> SemiSparse.from_dense(torch.tensor([[0.0, 2.0, 5.0, 1.0]]), kept=2, group=4).dense().tolist()
    [[0.0, 2.0, 5.0, 0.0]]
    """

    places: Tensor

    def __init__(self, values: Tensor, places: Tensor, *, kept: int, group: int) -> None:
        super().__init__()
        check_2d("values", values)
        if not 1 <= kept < group <= 256:
            raise ValueError(f"needs 1 <= kept < group <= 256, got {kept} of {group}.")
        m, stored = values.shape
        wanted = (m, packed_bytes(stored, _bits(group)))
        if stored % kept or places.dtype != torch.uint8 or places.shape != wanted:
            raise ValueError(
                f"values must hold {kept} numbers a group, and places be {wanted} uint8 for {stored} of them in "
                f"a row, got {places.dtype} {tuple(places.shape)}."
            )
        self.values = nn.Parameter(values)
        self.register_buffer("places", places)
        self.kept, self.group, self.shape = kept, group, (m, stored // kept * group)

    @classmethod
    def from_dense(cls, matrix: Tensor, mask: Tensor | None = None, *, kept: int, group: int) -> Self:
        """Keep the entries of an (m, n) matrix where ``mask`` is true, or the largest of each group."""
        check_2d("matrix", matrix)
        mask = largest_in_groups(matrix.abs(), kept, group) if mask is None else mask
        if not bool((mask.view(len(mask), -1, group).sum(2) == kept).all()):
            raise ValueError(f"the mask must keep {kept} of every {group} neighbouring entries of a row.")
        within = mask.nonzero()[:, 1].view(len(mask), -1) % group
        return cls(matrix[mask].view(len(mask), -1), pack(within, _bits(group)), kept=kept, group=group)

    @staticmethod
    def stored(m: int, n: int, kept: int, group: int) -> tuple[int, int]:
        """How many floating-point numbers and how many bytes of places are stored."""
        return m * n // group * kept, m * packed_bytes(n // group * kept, _bits(group))

    @property
    def params(self) -> int:
        """The kept entries, and a number for 16 bits of their places."""
        return self.values.numel() + -(-self.places.numel() // 2)

    @property
    def macs(self) -> int:
        """One multiply-add a kept entry, for hardware that skips the others; writing out takes m n."""
        return self.values.numel()

    def columns(self) -> Tensor:
        """(m, n / group * kept): in which column each value stands."""
        stored = self.values.shape[1]
        within = unpack(self.places, _bits(self.group))[:, :stored].long()
        return within + torch.arange(stored, device=within.device) // self.kept * self.group

    def chunk(self, count: int) -> list[Self]:
        """Cut into as many equal matrices below each other."""
        parts = zip(self.values.detach().chunk(count), self.places.chunk(count), strict=True)
        return [type(self)(v.clone(), p.clone(), kept=self.kept, group=self.group) for v, p in parts]

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        return x @ self.dense().mT

    def dense(self) -> Tensor:
        """(m, n)."""
        return self.values.new_zeros(self.shape).scatter(1, self.columns(), self.values)

    def check(self) -> None:
        """Raise unless every place is in its group and none is taken twice."""
        within = unpack(self.places, _bits(self.group))[:, : self.values.shape[1]]
        groups = within.view(len(within), -1, self.kept).sort(dim=2).values.int()
        if bool((groups >= self.group).any()) or bool((groups.diff(dim=2) == 0).any()):
            raise ValueError(
                "the places of a SemiSparse matrix are not distinct ones of their group; it is damaged."
            )

    def spec(self) -> dict[str, Any]:
        """Kind, shape, and how many of how many are kept."""
        return {"kind": "SemiSparse", "shape": list(self.shape), "kept": self.kept, "group": self.group}

    @classmethod
    def empty(cls, spec: Mapping[str, Any], **where: Any) -> Self:
        """Values that are not initialised, at the first places of their groups."""
        m, n = shape_of(spec)
        group = size(spec, "group", largest=256)
        kept = size(spec, "kept", largest=group)
        if n % group:
            raise ValueError(f"spec of SemiSparse: group must divide the {n} columns, got {group}.")
        within = torch.arange(n // group * kept, device="cpu").expand(m, -1) % kept
        places = pack(within, _bits(group)).to(where.get("device") or "cpu")
        return cls(torch.empty(within.shape, **where), places, kept=kept, group=group)


def _bits(group: int) -> int:
    return max((group - 1).bit_length(), 1)
