"""Sparse combinations of atoms that are orthonormal in the inputs' metric (COMPOT)."""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ..linalg import Metric, largest, largest_in_groups, orthogonal_dictionary
from .sparse_dictionary import SparseDictionary


@dataclass(frozen=True, kw_only=True)
class OrthogonalDictionary(SparseDictionary):
    """Write the rows or columns of the weight as sparse combinations of atoms, so that the loss changes little.

    A low-rank matrix puts all rows into one subspace; here each row has its own, spanned by some of the atoms.
    Rows or columns are written, whichever are shorter. Entries are kept where they matter most in the whole
    matrix, so rows differ in how many they have. Stored are atoms, entries, and a bitmap of their places, 16 of
    whose bits count as one number.

    Args:
        share: of its dense size that a layer takes; None offers 0.3, 0.45, 0.6 and 0.75.
        atoms_per_entry: atoms for each entry kept in an average row.
        steps: turns of choosing places, values and atoms.
        pattern: where entries may stand. With 2:4, two of every four neighbours are kept, two bits say where each
            stands, and rows are always written.
        layers: so many layers of one kind, one after the other, share their atoms; only in memory, of which it
            takes the square of their number.
        input_shrinkage: see :class:`KroneckerFactoredSvd`.
        input_damping: see :class:`KroneckerFactoredSvd`.
        output_damping: see :class:`KroneckerFactoredSvd`.

    References: COMPOT, arXiv 2602.15200, which has the same number of entries in every row and S = I; CoSpaDi,
        arXiv 2509.22075.
    """

    def entries(self, rows: int, atoms: int) -> int:
        """As many as make the ratio, over all rows together."""
        return max(int(rows * atoms / self.atoms_per_entry), 1)

    def decompose(
        self, weight: Tensor, outputs: Metric, inputs: Metric, atoms: int, kept: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take turns of two closed-form steps."""
        choose, group = partial(largest, kept=kept), 1
        if self.groups is not None:
            few, group = self.groups
            choose = partial(largest_in_groups, kept=few, group=group)
        return orthogonal_dictionary(
            weight, outputs, inputs, atoms=atoms, choose=choose, group=group, steps=self.steps
        )
