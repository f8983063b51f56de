"""What methods share that write a weight as sparse combinations of atoms."""

import abc
import copy
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..core.choices import Choices
from ..core.methods import check_count
from ..core.statistics import Stats
from ..linalg import Metric, metric_norm
from ..matrices import Dense, Product, SemiSparse, Sparse, StructuredMatrix
from .loss_metric import LossMetric

SHARES = (0.3, 0.45, 0.6, 0.75)
Pattern = Literal["free", "2:4"]


@dataclass(frozen=True, kw_only=True)
class SparseDictionary(LossMetric):
    """Writes the rows or columns of a weight, whichever are shorter, as sparse combinations of atoms.

    Stored are atoms, entries, and a bitmap of their places, 16 of whose bits count as one number.

    Args:
        share: of its dense size that a layer takes; None offers 0.3, 0.45, 0.6 and 0.75.
        atoms_per_entry: atoms for each entry kept in an average row.
        steps: turns of choosing places, values and atoms.
        pattern: where entries may stand. With 2:4, two of every four neighbours are kept, two bits say where each
            stands, and rows are always written.
        layers: so many layers of one kind, one after the other, share their atoms. Where the places of their
            entries would not fill whole numbers, they do not.
    """

    share: float | None = None
    atoms_per_entry: float = 2.0
    steps: int = 8
    pattern: Pattern = "free"
    layers: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(f"share must be > 0 and < 1, got {self.share}.")
        if not 1 <= self.atoms_per_entry < float("inf"):
            raise ValueError(f"atoms_per_entry must be a finite number >= 1, got {self.atoms_per_entry}.")
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}.")
        check_count("layers", self.layers)
        if self.pattern not in get_args(Pattern):
            raise ValueError(f"pattern must be one of {', '.join(get_args(Pattern))}, got {self.pattern!r}.")
        if self.groups and self.atoms_per_entry != self.groups[1] / self.groups[0]:
            raise ValueError(f"atoms_per_entry follows from the pattern {self.pattern}; leave it at 2.")

    @abc.abstractmethod
    def decompose(
        self, weight: Tensor, outputs: Metric, inputs: Metric, atoms: int, kept: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes (m, k), the mask of their ``kept`` entries, and atoms (k, n) that make the weight."""

    @abc.abstractmethod
    def entries(self, rows: int, atoms: int) -> int:
        """How many entries are kept where they may stand freely."""

    @property
    def groups(self) -> tuple[int, int] | None:
        """How many of how many neighbouring entries are kept, or None."""
        return None if self.pattern == "free" else (2, 4)

    def choices(self, weight: Tensor, stats: Stats) -> Choices:
        """Offer one or several sizes."""
        metrics = self.metrics(stats)
        shares = SHARES if self.share is None else [self.share]
        sizes = list(dict.fromkeys(size for share in shares for size in self._sizes(weight, share)))
        errors, only = [], None
        for size in sizes:
            fitted = self._fit(weight, metrics, *size)
            errors.append(metric_norm(weight - fitted.dense().detach(), *metrics))
            only = fitted.to(weight.dtype) if len(sizes) == 1 else None  # what is offered alone is wanted
        stored = [self._stored(weight, *size) for size in sizes]
        floats, places = torch.tensor(stored, dtype=torch.int64).view(-1, 2).T
        atoms = torch.tensor([size[0] for size in sizes], dtype=torch.int64)
        again = (self.layers - 1) * self._written(weight)[1] * atoms  # all layers use what is stored once

        def build(i: int, weight: Tensor, stats: Stats) -> StructuredMatrix:
            return self._fit(weight, self.metrics(stats), *sizes[i]).to(weight.dtype)

        return Choices(
            costs={
                "params": floats + (places + 1) // 2,
                "bytes": floats * weight.element_size() + places,
                "macs": floats + again,
            },
            errors=self.scale * torch.tensor(errors, dtype=torch.float64),
            total=self.scale * metric_norm(weight, *metrics),
            build=lambda i: build(i, weight, stats) if only is None else copy.deepcopy(only),
            refit=build,
            error_of=self.error_of(stats),
        )

    def axis(self, m: int, n: int) -> int | None:
        """Let all that is written stand below each other."""
        beside = self.groups is None and m < n
        if beside:
            return None if n % 16 else 1
        return None if m % 2 else 0

    def apart(self, matrix: StructuredMatrix) -> list[StructuredMatrix]:
        """Give each layer its codes, and all the same atoms."""
        if self.layers == 1:
            return [matrix]
        assert isinstance(matrix, Product)
        left, right = matrix.parts
        if isinstance(right, Sparse):
            return [Product(left, codes) for codes in right.chunk(self.layers, 1)]
        assert isinstance(left, (Sparse, SemiSparse))
        return [Product(codes, right) for codes in left.chunk(self.layers)]

    def _written(self, weight: Tensor) -> tuple[int, int]:
        """How many rows are written, and how long they are."""
        m, n = weight.shape
        return (n, m) if self._transposed(weight) else (m, n)

    def _transposed(self, weight: Tensor) -> bool:
        return self.groups is None and weight.shape[0] < weight.shape[1]

    def _sizes(self, weight: Tensor, share: float) -> list[tuple[int, int]]:
        """How many atoms, and entries of all rows, take this share of the dense size; nothing where none do."""
        rows, length = self._written(weight)
        most = int(share * rows * length / (length + rows * (1 / self.atoms_per_entry + 1 / 16)))
        kept, group = self.groups or (1, 1)
        atoms = min(max(most, 1), length) // group * group
        while atoms:
            size = atoms, self.entries(rows, atoms) if self.groups is None else rows * atoms // group * kept
            floats, places = self._stored(weight, *size)
            if floats + (places + 1) // 2 <= share * weight.numel() or atoms == 1:
                return [size]
            atoms -= group  # rows of the bitmap end in whole bytes
        return []

    def _stored(self, weight: Tensor, atoms: int, kept: int) -> tuple[int, int]:
        """How many numbers are stored, and how many bytes for the places of the entries."""
        rows, length = self._written(weight)
        floats = atoms * length + kept
        if self.groups is not None:
            return floats, SemiSparse.stored(rows, atoms, *self.groups)[1]
        shape = (atoms, rows) if self._transposed(weight) else (rows, atoms)
        return floats, int(Sparse.stored(*shape, torch.tensor(kept))[1])

    def _fit(self, weight: Tensor, metrics: tuple[Metric, Metric], atoms: int, kept: int) -> StructuredMatrix:
        """Return the matrix in float64."""
        outputs, inputs = metrics
        if self._transposed(weight):
            codes, mask, basis = self.decompose(weight.mT, inputs, outputs, atoms, kept)
            return Product(Dense(basis.mT.contiguous()), Sparse.from_dense(codes.mT, mask.mT))
        codes, mask, basis = self.decompose(weight, outputs, inputs, atoms, kept)
        if self.groups is None:
            return Product(Sparse.from_dense(codes, mask), Dense(basis))
        kept, group = self.groups
        return Product(SemiSparse.from_dense(codes, mask, kept=kept, group=group), Dense(basis))
