"""Systems with the Kronecker product of two factors and damping."""

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .kronecker_basis import KroneckerBasis, eigen
from .scaled_plus_low_rank import damped_root

Share = Callable[[Tensor, Tensor, float], tuple[float, float]]
"""From factors and damping to what is added to each of them."""


class KroneckerSolver(abc.ABC):
    """Solves G X A = V with some damping, for positive semi-definite A (n, n) and G (m, m) or their diagonals."""

    sign: ClassVar[str]
    """A name that is in what was prepared."""

    @abc.abstractmethod
    def prepare(self, inputs: Tensor, outputs: Tensor, damping: float) -> dict[str, Tensor]:
        """Return what makes solving cheap.

        Args:
            inputs: A, (n, n) or its diagonal (n,).
            outputs: G, (m, m) or its diagonal (m,).
            damping: > 0.
        """

    @abc.abstractmethod
    def solve(self, matrix: Tensor, prepared: Mapping[str, Tensor], damping: float) -> Tensor:
        """Return X for V (m, n)."""


@dataclass(frozen=True)
class Jointly(KroneckerSolver):
    """G X A + damping X = V, exactly, by eigenvectors; it follows the damping of each solve.

    >>> solver = Jointly()
    >>> prepared = solver.prepare(torch.tensor([[3.0]]), torch.tensor([[2.0]]), 1.0)
    >>> solver.solve(torch.tensor([[14.0]]), prepared, 1.0)
    tensor([[2.]])
    """

    sign = "inputs.values"

    def prepare(self, inputs: Tensor, outputs: Tensor, damping: float) -> dict[str, Tensor]:
        """Eigenvalues, and the eigenvectors of what is no diagonal."""
        return eigen(inputs, outputs)

    def solve(self, matrix: Tensor, prepared: Mapping[str, Tensor], damping: float) -> Tensor:
        """Divide coordinates by products of eigenvalues plus damping."""
        basis = KroneckerBasis.of(prepared)
        products = prepared["outputs.values"][:, None] * prepared["inputs.values"]
        return basis.back(basis.into(matrix) / (products + damping))


def balanced(inputs: Tensor, outputs: Tensor, damping: float) -> tuple[float, float]:
    """Split damping into pi sqrt(damping) and sqrt(damping) / pi, where pi^2 is the ratio of mean eigenvalues.

    References: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature",
        2015, arXiv 1503.05671.
    """
    means = [float((f if f.dim() == 1 else f.diagonal()).mean()) for f in (inputs, outputs)]
    ratio = (means[0] / means[1]) ** 0.5 if min(means) > 0 else 1.0
    return ratio * damping**0.5, damping**0.5 / ratio


def both(inputs: Tensor, outputs: Tensor, damping: float) -> tuple[float, float]:
    """Add the whole damping to both factors, which damps by damping (mean of both) + damping^2 in all.

    References: Pauloski, Huang, Xu, Chard, Hou, Foster, Zhang, "KAISA: an adaptive second-order optimizer
        framework for deep neural networks", 2021, arXiv 2107.01739 (the inverse method of its code).
    """
    return damping, damping


@dataclass(frozen=True)
class Separately(KroneckerSolver):
    """(G + b I) X (A + a I) = V by Cholesky factors: cheaper than eigenvectors, and another damping than theirs.

    The product has G kron a I and b I kron A beside the a b I that ``balanced`` makes equal to the damping, so
    that the same number damps more than with :class:`Jointly`. The damping is that of the preparation.

    Args:
        share: from A, G and the damping to a and b: ``balanced`` or ``both``.
    """

    share: Share = balanced
    sign = "inputs.root"

    def prepare(self, inputs: Tensor, outputs: Tensor, damping: float) -> dict[str, Tensor]:
        """Cholesky factors."""
        more = self.share(inputs, outputs, damping)
        return {"inputs.root": _root(inputs, more[0]), "outputs.root": _root(outputs, more[1])}

    def solve(self, matrix: Tensor, prepared: Mapping[str, Tensor], damping: float) -> Tensor:
        """Two triangular systems on each side."""
        return _solved(_solved(matrix, prepared["outputs.root"]).mT, prepared["inputs.root"]).mT


def _root(factor: Tensor, damping: float) -> Tensor:
    return (factor + damping).sqrt() if factor.dim() == 1 else damped_root(factor, damping)


def _solved(right: Tensor, root: Tensor) -> Tensor:
    """Solve L L' X = B for B (n, k)."""
    return right / root.square()[:, None] if root.dim() == 1 else torch.cholesky_solve(right, root)
