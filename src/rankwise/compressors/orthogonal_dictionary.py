"""Sparse combinations of atoms that are orthonormal in the inputs' metric (COMPOT)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.choices import Choices
from ..core.statistics import Stats
from ..linalg import Metric, metric_norm, orthogonal_dictionary
from ..matrices import Dense, Product, Sparse, StructuredMatrix
from .loss_metric import LossMetric

SHARES = (0.3, 0.45, 0.6, 0.75)


@dataclass(frozen=True, kw_only=True)
class OrthogonalDictionary(LossMetric):
    """Write the rows or columns of the weight as sparse combinations of atoms, so that the loss changes little.

    A low-rank matrix puts all rows into one subspace; here each row has its own, spanned by some of the atoms.
    Rows or columns are written, whichever are shorter. Entries are kept where they matter most in the whole
    matrix, so rows differ in how many they have. Stored are atoms, entries, and a bitmap of their places, 16 of
    whose bits count as one number.

    Args:
        share: of its dense size that a layer takes; None offers 0.3, 0.45, 0.6 and 0.75.
        atoms_per_entry: atoms for each entry kept in an average row.
        steps: turns of choosing places, values and atoms.
        input_shrinkage: see :class:`KroneckerFactoredSvd`.
        input_damping: see :class:`KroneckerFactoredSvd`.
        output_damping: see :class:`KroneckerFactoredSvd`.

    References: COMPOT, arXiv 2602.15200, which has the same number of entries in every row and S = I; CoSpaDi,
        arXiv 2509.22075.
    """

    share: float | None = None
    atoms_per_entry: float = 2.0
    steps: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(f"share must be > 0 and < 1, got {self.share}.")
        if not 1 <= self.atoms_per_entry < float("inf"):
            raise ValueError(f"atoms_per_entry must be a finite number >= 1, got {self.atoms_per_entry}.")
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}.")

    def choices(self, weight: Tensor, stats: Stats) -> Choices:
        """Offer one or several sizes."""
        rows, length = max(weight.shape), min(weight.shape)  # what is written, and how long it is
        metrics = self.metrics(stats)
        shares = SHARES if self.share is None else [self.share]
        sizes = list(dict.fromkeys(self._sizes(rows, length, share) for share in shares))
        errors = [
            metric_norm(weight - self._fit(weight, metrics, *size).dense().detach(), *metrics) for size in sizes
        ]
        floats = torch.tensor([atoms * length + kept for atoms, kept in sizes])
        tall = weight.shape[0] >= weight.shape[1]
        places = [(rows, atoms) if tall else (atoms, rows) for atoms, _ in sizes]
        bitmaps = torch.tensor([int(Sparse.stored(*place, floats)[1][0]) for place in places])
        return Choices(
            costs={
                "params": floats + (bitmaps + 1) // 2,
                "bytes": floats * weight.element_size() + bitmaps,
                "macs": floats,
            },
            errors=self.scale * torch.tensor(errors).double(),
            total=self.scale * metric_norm(weight, *metrics),
            build=lambda i: self._fit(weight, self.metrics(stats), *sizes[i]).to(weight.dtype),
            error_of=self.error_of(stats),
        )

    def _sizes(self, rows: int, length: int, share: float) -> tuple[int, int]:
        """How many atoms, and entries of all rows, take this share of the dense size."""
        atoms = int(share * rows * length / (length + rows * (1 / self.atoms_per_entry + 1 / 16)))
        atoms = min(max(atoms, 1), length)
        return atoms, max(int(rows * atoms / self.atoms_per_entry), 1)

    def _fit(self, weight: Tensor, metrics: tuple[Metric, Metric], atoms: int, kept: int) -> StructuredMatrix:
        """Return the matrix in float64."""
        outputs, inputs = metrics
        if weight.shape[0] >= weight.shape[1]:
            codes, mask, basis = orthogonal_dictionary(
                weight, outputs, inputs, atoms=atoms, kept=kept, steps=self.steps
            )
            return Product(Sparse.from_dense(codes, mask), Dense(basis))
        codes, mask, basis = orthogonal_dictionary(
            weight.mT, inputs, outputs, atoms=atoms, kept=kept, steps=self.steps
        )
        return Product(Dense(basis.mT.contiguous()), Sparse.from_dense(codes.mT, mask.mT))
