"""Coordinates of matrices in a basis of outer products."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .khatri_rao import KhatriRao
from .symmetric_eigen import symmetric_eigen


@dataclass(frozen=True)
class KroneckerBasis:
    """The basis l_i r_j' of the (m, n) matrices, from orthonormal columns.

    Args:
        left: (m, m), or None for the unit vectors.
        right: (n, n), or None for the unit vectors.
    """

    left: Tensor | None = None
    right: Tensor | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "KroneckerBasis":
        """Return the one that :func:`eigen` found."""
        return cls(tensors.get("outputs.vectors"), tensors.get("inputs.vectors"))

    def into(self, matrix: Tensor) -> Tensor:
        """Return the coordinates L' V R, (m, n)."""
        matrix = matrix if self.left is None else self.left.mT @ matrix
        return matrix if self.right is None else matrix @ self.right

    def back(self, coordinates: Tensor) -> Tensor:
        """Return L C R', (m, n)."""
        coordinates = coordinates if self.left is None else self.left @ coordinates
        return coordinates if self.right is None else coordinates @ self.right.mT

    def of_samples(self, samples: KhatriRao) -> KhatriRao:
        """Return the samples' coordinates. Numbers of tokens are only seen with unit vectors on the right."""
        inputs = samples.inputs if self.right is None else samples.inputs @ self.right
        gradients = samples.gradients if self.left is None else samples.gradients @ self.left
        return KhatriRao(inputs, gradients, samples.width)

    def diagonal_from(self, other: "KroneckerBasis", values: Tensor) -> Tensor:
        """Return, in this basis, the diagonal of the operator that has a diagonal (m, n) in another one."""
        left, right = _overlap(self.left, other.left), _overlap(self.right, other.right)
        values = values if left is None else left @ values
        return values if right is None else values @ right.mT


def eigen(inputs: Tensor, outputs: Tensor) -> dict[str, Tensor]:
    """Return the eigenvalues of two factors (n, n) and (m, m), and the eigenvectors of what is no diagonal."""
    found = {}
    for name, factor in (("inputs", inputs), ("outputs", outputs)):
        if factor.dim() == 1:
            found[f"{name}.values"] = factor.clone()
        else:
            found[f"{name}.values"], found[f"{name}.vectors"] = symmetric_eigen(factor)
    return found


def _overlap(new: Tensor | None, old: Tensor | None) -> Tensor | None:
    """Squared inner products of the vectors of two bases, or None where both are the unit vectors."""
    if new is None or old is None:
        return None
    return (new.mT @ old).square()
