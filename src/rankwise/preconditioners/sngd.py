"""The exact damped natural gradient of one batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from ..core.capture import Rows
from ..core.preconditioner import Curvature, Damping, Preconditioner, Shared, Size, damping_at, every_step
from ..core.sampled_fisher import divided, root_of, row_length, shared_bytes, stored
from ..linalg import Sharing, exact, expanded, reduced


@dataclass(frozen=True, kw_only=True)
class Sngd(Preconditioner):
    """Multiply by (U U'/N + damping I)^-1 through a system with as many unknowns as there are samples.

    With the samples' gradients as the columns of U and the kernel K = U'U, whose entries need no U,
    (F + a I)^-1 V = (V - U (K/N + a I)^-1 U'V / N) / a (Sherman, Morrison and Woodbury). Samples of all processes
    are gathered. In float32, damping below 1e-5 of the largest eigenvalue of F leaves little of the digits.

    Args:
        damping: a > 0, in units of squared gradients of single samples, or of the positions that their losses are
            means over where a step is told their number; or a function of the step. F shrinks like the squared
            loss, and a should with it.
        every: steps between two looks at the samples; in between the old ones are used.
        together: one kernel for all layers, with the terms between them; else one for each layer.
        sharing: of samples with several positions, :func:`rankwise.linalg.exact`, ``expanded`` or ``reduced``.

    References: Ren and Goldfarb, "Efficient subsampled Gauss-Newton and natural gradient methods for training
        neural networks", 2019, arXiv 1906.02353; by layers: Soori, Can, Mu, Gürbüzbalaban and Mehri Dehnavi,
        "TENGraD: time-efficient natural gradient descent with exact Fisher-block inversion", 2021, arXiv
        2106.03947.
    """

    forming: ClassVar = ("together",)
    damping: Damping = 0.1
    every: int = 1
    together: bool = False
    sharing: Sharing = exact

    def __post_init__(self) -> None:
        every_step(self.every)
        damping_at(self.damping, 0)
        if self.together and self.sharing is expanded:
            raise ValueError("together needs the samples as they are; take sharing=exact or reduced.")

    def captures(self, step: int) -> bool:
        """At the first of every few steps."""
        return step % self.every == 0

    @property
    def whole(self) -> bool:
        """As the field says."""
        return self.together

    @property
    def reduces(self) -> bool:
        """Where samples are shared so."""
        return self.sharing is reduced

    def local(
        self, rows: Sequence[Rows], curvature: Curvature, generator: Generator, samples: int, damping: float
    ) -> Shared:
        """All samples."""
        if self.together and any(len(layer.each) != layer.samples for layer in rows):
            raise ValueError("a layer sees other rows than the model's samples; leave it out, or together=False.")
        return Shared(rows=stored(self.sharing(layer.each) for layer in rows))

    def update(self, shared: Shared, samples: int, curvature: Curvature) -> None:
        """Keep the samples of all."""
        curvature |= shared.rows
        curvature["samples"] = torch.tensor(samples)

    def invert(self, curvature: Curvature, damping: float, shapes: Sequence[tuple[int, int]]) -> Curvature:
        """The Cholesky factor of K/N + damping I."""
        return root_of(curvature, damping, shapes)

    def apply(self, gradients: Sequence[Tensor], curvature: Curvature, damping: float) -> list[Tensor]:
        """(V - U (K/N + a I)^-1 U'V / N) / a, with the damping of the last inversion."""
        return divided(gradients, curvature)

    def state_bytes(self, sizes: Sequence[Size]) -> int:
        """All rows, and the root of their kernel."""
        found = [shared_bytes(size, self.sharing) for size in sizes]
        return sum(rows * each for rows, each in found) + found[0][0] ** 2 * sizes[0].dtype.itemsize

    def cost(self, shapes: Sequence[tuple[int, int]]) -> float:
        """Kernels of equal size, from rows as long as (m, n) say."""
        return row_length(shapes)
