"""A matrix with few entries that are not zero, each with the number of its column."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from .base import StructuredMatrix, check_2d, shape_of, size

SHORT = 2**16  # columns that an index of two bytes tells apart


class IndexedSparse(StructuredMatrix):
    """The entries that are not zero, row by row, their columns, and how many each row has.

    A column takes two bytes, or four where there are more than 65536. Smaller than :class:`Sparse` where fewer
    than one entry in 16 is kept. Applying the matrix writes it out: this saves memory, not time.

    Args:
        values: (k,), in the order of the rows.
        columns: (k,) integers, increasing in each row.
        counts: (m,) integers.
        width: n.

    >>> import torch
    >>> IndexedSparse.from_dense(torch.tensor([[0.0, 2.0], [3.0, 0.0]])).dense().tolist()
    [[0.0, 2.0], [3.0, 0.0]]
    """

    columns: Tensor
    counts: Tensor

    def __init__(self, values: Tensor, columns: Tensor, counts: Tensor, width: int) -> None:
        super().__init__()
        if (
            values.dim() != 1
            or not values.is_floating_point()
            or columns.shape != values.shape
            or counts.dim() != 1
        ):
            raise TypeError(
                f"needs values (k,) of floating point, columns (k,) and counts (m,), got {values.dtype} "
                f"{tuple(values.shape)}, {tuple(columns.shape)}, {tuple(counts.shape)}."
            )
        self.values = nn.Parameter(values)
        self.register_buffer("columns", columns.to(torch.uint16 if width <= SHORT else torch.int32))
        self.register_buffer("counts", counts.to(torch.int32))
        self.shape = (len(counts), width)

    @classmethod
    def from_dense(cls, matrix: Tensor, mask: Tensor | None = None) -> Self:
        """Keep the entries of an (m, n) matrix where ``mask`` is true, or those that are not zero."""
        check_2d("matrix", matrix)
        mask = matrix != 0 if mask is None else mask
        return cls(matrix[mask], mask.nonzero()[:, 1], mask.sum(1), matrix.shape[1])

    @classmethod
    def from_places(cls, values: Tensor, places: Tensor, shape: tuple[int, int]) -> Self:
        """Put values (k,) at increasing places (k,) of the flattened matrix."""
        m, n = shape
        return cls(values, places % n, torch.bincount(places // n, minlength=m), n)

    @staticmethod
    def stored(m: int, n: int, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How many floating-point numbers, integers, and bytes of integers ``kept`` entries take."""
        return kept, kept + m, kept * (2 if n <= SHORT else 4) + 4 * m

    @property
    def macs(self) -> int:
        """One multiply-add a kept entry, for who skips the zeros; writing out takes m n."""
        return self.values.numel()

    def places(self) -> Tensor:
        """(k,): where the entries stand in the flattened matrix."""
        (m, n), kept = self.shape, self.values.numel()
        rows = torch.arange(m, device=self.counts.device).repeat_interleave(self.counts.long(), output_size=kept)
        return rows * n + self.columns.long()

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        return x @ self.dense().mT

    def dense(self) -> Tensor:
        """(m, n)."""
        m, n = self.shape
        return self.values.new_zeros(m * n).scatter(0, self.places(), self.values).view(m, n)

    def check(self) -> None:
        """Raise unless the counts add up and the columns of each row increase."""
        counts, columns = self.counts.long(), self.columns.long()
        sound = bool((counts >= 0).all()) and int(counts.sum()) == len(columns)
        if not sound or bool((columns >= self.shape[1]).any()) or not bool((self.places().diff() > 0).all()):
            raise ValueError("the columns of an IndexedSparse matrix do not increase in each row; it is damaged.")

    def spec(self) -> dict[str, Any]:
        """Kind, shape, and how many entries are kept."""
        return {"kind": "IndexedSparse", "shape": list(self.shape), "kept": self.values.numel()}

    @classmethod
    def empty(cls, spec: Mapping[str, Any], **where: Any) -> Self:
        """The spec's number of entries, not initialised, at the first places."""
        m, n = shape_of(spec)
        kept = size(spec, "kept", least=0, largest=m * n)
        places = torch.arange(kept, device="cpu")  # whatever the default is
        counts = torch.bincount(places // n, minlength=m).to(where.get("device") or "cpu")
        return cls(torch.empty(kept, **where), (places % n).to(counts.device), counts, n)
