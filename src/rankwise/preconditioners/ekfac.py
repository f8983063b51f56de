"""Natural gradients with second moments in the eigenbasis of Kronecker factors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from ..core.capture import Rows
from ..core.kronecker_factors import (
    average,
    averaged,
    factor_bytes,
    factor_sums,
    factors,
    found_or_kept,
    update_factors,
)
from ..core.preconditioner import Curvature, Shared, Size
from ..linalg import KroneckerBasis, Sharing, eigen, exact, reduced
from .factored import Factored


@dataclass(frozen=True, kw_only=True)
class Ekfac(Factored):
    """Divide by second moments of samples' gradients in the eigenbasis of K-FAC's factors, plus damping.

    With eigenvectors Q_G and Q_A of the factors of :class:`Kfac`, the diagonal of F in the basis Q_G kron Q_A is
    the mean of (Q_G' V_k Q_A)^2 over the samples' gradients V_k. Of all diagonals in that basis it is nearest to
    F in the Frobenius norm, and so never farther than K-FAC's products of eigenvalues.

    Moments are averages over batches, of which each is measured in the basis that the step began with: the first
    step is K-FAC's. Where a new basis is found, what is known is carried over as the diagonal that the old
    approximation has in the new basis. Eigenvectors of equal eigenvalues, such as the zeros of factors from few
    samples, are not determined: there several processes may find another basis than one does, which is as good.

    Args:
        damping: in units of squared gradients of single samples, or of the positions that their losses are means
            over where a step is told their number; or a function of the step.
        every: steps between two new bases, a multiple of ``factors_every``.
        factors_every: steps between two looks at the samples.
        early: how many steps at the beginning find a new basis after each look, whatever ``every`` says: averages
            are young and weights move far, so that old bases do the most harm.
        decay: of running averages, for each look.
        sharing: what the factors make of samples with several positions, :func:`rankwise.linalg.expanded` or
            ``reduced``.
        moments: what the second moments make of them: ``exact`` takes the gradients of samples as they are.
        largest_side: of a layer above which a factor counts as diagonal, with unit vectors as its basis.
        identity_start: begin the factors' averages at the identity.

    References: George, Laurent, Bouthillier, Ballas, Vincent, "Fast approximate natural gradient descent in a
        Kronecker-factored eigenbasis", 2018, arXiv 1806.03884.
    """

    forming: ClassVar = ("largest_side",)
    moments: Sharing = exact

    @property
    def projects(self) -> bool:
        """Samples are measured in the basis that was found last."""
        return True

    @property
    def reduces(self) -> bool:
        """Where factors and moments are content with that."""
        return super().reduces and self.moments is reduced

    def local(
        self, rows: Sequence[Rows], curvature: Curvature, generator: Generator, samples: int, damping: float
    ) -> Shared:
        """Sums of products, and of squared coordinates once there is a basis."""
        sums = factor_sums(rows[0], self.sharing, self.largest_side)
        if "inputs.values" in curvature:
            sums["moments"] = KroneckerBasis.of(curvature).of_samples(self.moments(rows[0].each)).squares()
        return Shared(sums=sums)

    def update(self, shared: Shared, samples: int, curvature: Curvature) -> None:
        """Move the running averages."""
        update_factors(curvature, shared.sums, samples, self.decay, self.identity_start)
        if "moments" in shared.sums:
            average(curvature, {"moments": shared.sums["moments"] / samples}, self.decay)

    def invert(self, curvature: Curvature, damping: float, shapes: Sequence[tuple[int, int]]) -> Curvature:
        """A new basis, with the moments in it; where it is not to be had, the previous is kept with a warning."""
        found = found_or_kept(lambda: eigen(*factors(curvature, shapes[0])), curvature, "inputs.values")
        if found and "moments" in curvature:
            old, new = KroneckerBasis.of(curvature), KroneckerBasis.of(found)
            found["moments"] = new.diagonal_from(old, curvature["moments"])
        return found

    def apply(self, gradients: Sequence[Tensor], curvature: Curvature, damping: float) -> list[Tensor]:
        """Divide coordinates by moments plus damping."""
        basis = KroneckerBasis.of(curvature)
        if "moments" in curvature:
            moments = averaged(curvature, "moments")
        else:
            moments = torch.outer(curvature["outputs.values"], curvature["inputs.values"])
        return [basis.back(basis.into(gradient) / (moments + damping)) for gradient in gradients]

    def state_bytes(self, sizes: Sequence[Size]) -> int:
        """Factors, bases and moments; but for vectors."""
        moments = sum(size.shape[0] * size.shape[1] * size.dtype.itemsize for size in sizes)
        return factor_bytes(sizes, self.largest_side) + moments
