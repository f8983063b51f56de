"""Natural gradients with the Kronecker factors of each layer's curvature."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from ..core.capture import Rows
from ..core.kronecker_factors import (
    factor_bytes,
    factor_sums,
    factors,
    found_or_kept,
    update_factors,
)
from ..core.preconditioner import Curvature, Shared, Size
from ..linalg import Jointly, KroneckerSolver
from .factored import Factored


@dataclass(frozen=True, kw_only=True)
class Kfac(Factored):
    """Divide by G kron A + damping I, from second moments A of a layer's inputs and G of its output gradients.

    F is the mean of (g kron a)(g kron a)' over samples, and E[g g'] kron E[a a'] is near where inputs say little
    about gradients; it is exact for one sample, and for linear networks with a squared loss whose residuals
    do not depend on the inputs. A is a mean over positions, G a sum over the positions of a sample; positions
    without any gradient do not count. Both are running averages over batches whose bias is corrected.

    The published code of KAISA (kfac-pytorch 0.4) takes gradients of the mean loss and divides those of
    convolutions, and their inputs, by the number of positions T: its F is that here divided by N^2 T, for
    convolutions by N^2 T^5, and its damping means as many times more.

    Args:
        damping: in units of squared gradients of single samples, or of the positions that their losses are means
            over where a step is told their number; or a function of the step.
        every: steps between two inversions, a multiple of ``factors_every``.
        factors_every: steps between two looks at the samples.
        early: how many steps at the beginning invert after each look, whatever ``every`` says: averages
            are young and weights move far, so that old inverses do the most harm.
        decay: of running averages, for each look.
        sharing: of samples with several positions, :func:`rankwise.linalg.expanded` or ``reduced``.
        solver: :class:`rankwise.linalg.Jointly` damps the product exactly, by eigenvectors; ``Separately()``
            damps both factors, and ``Separately(share=both)`` does it as the inverse method of KAISA.
        largest_side: of a layer above which a factor is replaced by its diagonal, as an output head needs it.
            Factors of embeddings on the side of the tokens are diagonal, exactly so, at any size.
        identity_start: begin averages at the identity, as KAISA does, whose weight falls by ``decay`` a look.

    References: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature",
        2015, arXiv 1503.05671; Grosse and Martens, "A Kronecker-factored approximate Fisher matrix for
        convolution layers", 2016, arXiv 1602.01407; Pauloski, Huang, Xu, Chard, Hou, Foster, Zhang, "KAISA: an
        adaptive second-order optimizer framework for deep neural networks", 2021, arXiv 2107.01739. Of the
        first, which has ``early=3``, the adaptive damping, the rescaling of steps and sampled labels are not
        included.
    """

    forming: ClassVar = ("largest_side", "solver")
    solver: KroneckerSolver = Jointly()  # noqa: RUF009 (frozen)

    def local(
        self, rows: Sequence[Rows], curvature: Curvature, generator: Generator, samples: int, damping: float
    ) -> Shared:
        """Sums of products, each as one triangle."""
        return Shared(sums=factor_sums(rows[0], self.sharing, self.largest_side))

    def update(self, shared: Shared, samples: int, curvature: Curvature) -> None:
        """Move the running averages."""
        update_factors(curvature, shared.sums, samples, self.decay, self.identity_start)

    def invert(self, curvature: Curvature, damping: float, shapes: Sequence[tuple[int, int]]) -> Curvature:
        """What the solver prepares; where that fails, the previous is kept with a warning."""
        return found_or_kept(
            lambda: self.solver.prepare(*factors(curvature, shapes[0]), damping), curvature, self.solver.sign
        )

    def apply(self, gradients: Sequence[Tensor], curvature: Curvature, damping: float) -> list[Tensor]:
        """Solve for each gradient."""
        return [self.solver.solve(gradient, curvature, damping) for gradient in gradients]

    def state_bytes(self, sizes: Sequence[Size]) -> int:
        """Factors, and what makes solving cheap; but for vectors."""
        return factor_bytes(sizes, self.largest_side)
