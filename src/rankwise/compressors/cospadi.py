"""Sparse combinations of any atoms, learnt by matching pursuit and K-SVD (CoSpaDi)."""

from dataclasses import dataclass

from torch import Tensor

from ..linalg import Metric, learned_dictionary
from .sparse_dictionary import SparseDictionary


@dataclass(frozen=True, kw_only=True)
class CoSpaDi(SparseDictionary):
    """Write the rows or columns of the weight as combinations of equally many atoms each, none orthogonal.

    Atoms and codes are learnt on whitened rows, as the paper does, each row weighted by its entry in the diagonal
    of S; then values and atoms are fitted to the metric of the loss. Rows or columns are written, whichever are
    shorter (the paper: rows). :class:`OrthogonalDictionary` has closed-form steps instead.

    Args:
        share: of its dense size that a layer takes; None offers 0.3, 0.45, 0.6 and 0.75.
        atoms_per_entry: atoms for each entry kept in a row.
        steps: turns of matching pursuit and K-SVD. The paper has about 60; a few serve nearly as well.
        pattern: where entries may stand. With 2:4, two of every four neighbours are kept, two bits say where each
            stands, and rows are always written.
        layers: so many layers of one kind, one after the other, share their atoms; only in memory, of which it
            takes the square of their number.
        powers: power iterations for an atom; the paper has about 8.
        picked_share: of a row's entries, how many matching pursuit takes at once; 0 takes one, as the paper does.
        input_shrinkage: see :class:`KroneckerFactoredSvd`.
        input_damping: see :class:`KroneckerFactoredSvd`.
        output_damping: see :class:`KroneckerFactoredSvd`.

    References: Makhov et al., "COSPADI: Compressing LLMs via Calibration-Guided Sparse Dictionary Learning",
        2025, arXiv 2509.22075. ``CoSpaDi(steps=60, powers=8, picked_share=0)`` is nearest to it.
    """

    steps: int = 3
    powers: int = 1
    picked_share: float = 0.08

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.powers < 1:
            raise ValueError(f"powers must be >= 1, got {self.powers}.")
        if not 0 <= self.picked_share <= 1:
            raise ValueError(f"picked_share must be >= 0 and <= 1, got {self.picked_share}.")

    def entries(self, rows: int, atoms: int) -> int:
        """Equally many in every row."""
        return rows * max(int(atoms / self.atoms_per_entry), 1)

    def decompose(
        self, weight: Tensor, outputs: Metric, inputs: Metric, atoms: int, kept: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Learn a dictionary."""
        few, group = self.groups or (kept // len(weight), None)
        return learned_dictionary(
            weight,
            outputs,
            inputs,
            atoms=atoms,
            kept=few,
            group=group,
            steps=self.steps,
            powers=self.powers,
            picks=max(int(self.picked_share * kept / len(weight)), 1),
        )
