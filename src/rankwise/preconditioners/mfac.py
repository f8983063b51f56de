"""The natural gradient of a window of the last gradients (M-FAC)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.preconditioner import Curvature, Damping, Preconditioner, Size, damping_at, every_step
from ..linalg import GradientWindow


@dataclass(frozen=True, kw_only=True)
class MFac(Preconditioner):
    """Multiply by (G'G/k + damping I)^-1, where G holds the gradients of the last k steps, this one's included.

    No sample is looked at, so that any layer and any loss will do: gradients are those of the mean loss of whole
    batches. Kept are k copies of the gradients and their inner products; a step costs two products with G and a
    Cholesky decomposition of k x k numbers. Momentum comes after, from the optimiser (the authors' is
    ``torch.optim.SGD(..., momentum=b, dampening=b)``); what is to enter the curvature as weight decay does for
    them belongs into the loss. Every process keeps the same window, so that nothing is exchanged.

    Args:
        gradients: k, the length of the window: this many copies of what is preconditioned.
        damping: > 0, in units of squared gradients of batches, which are smaller for large batches; or a function
            of the step. The number of positions of a step says nothing here.
        together: one window for all layers, with the terms between them; else one for each layer.
        mean_over_all: divide by k also in the first k - 1 steps, as the released code does, as if the gradients
            before the first were zero. Then the first steps are some k times as long as later ones.
        storage: type in which gradients are kept; None means that in which they are. bfloat16 halves the memory
            and bears little damping badly, since what is lost counts over k * damping.

    References: Frantar, Kurtic, Alistarh, "M-FAC: efficient matrix-free approximations of second-order
        information", NeurIPS 2021, arXiv 2107.03356: k = 1024, damping 1e-5, all layers together.

    >>> window = MFac(gradients=2, damping=1.0)
    >>> curvature, gradient = {}, torch.tensor([[3.0, 0.0]])
    >>> window.observe([gradient], curvature, 1.0)
    >>> window.apply([gradient], curvature, 1.0)  # 3 / (3^2 + 1)
    [tensor([[0.3000, 0.0000]])]
    """

    forming: ClassVar = ("gradients", "storage", "together")
    gradients: int = 1024
    damping: Damping = 1e-5
    together: bool = False
    mean_over_all: bool = False
    storage: torch.dtype | None = None

    def __post_init__(self) -> None:
        every_step(self.gradients, "gradients")
        damping_at(self.damping, 0)
        if self.storage is not None and not self.storage.is_floating_point:
            raise ValueError(f"storage must be a type of floating point or None, got {self.storage}.")

    @property
    def sees_rows(self) -> bool:
        """Gradients alone."""
        return False

    def captures(self, step: int) -> bool:
        """Never."""
        return False

    @property
    def whole(self) -> bool:
        """As the field says."""
        return self.together

    def observe(self, gradients: Sequence[Tensor], curvature: Curvature, damping: float) -> None:
        """Put the gradient in the place of the oldest one."""
        row, k = _flat(gradients), self.gradients
        if not curvature:
            curvature["rows"] = row.new_zeros(k, len(row), dtype=self.storage or row.dtype)
            curvature["gram"] = row.new_zeros(k, k)
            curvature["seen"] = torch.zeros((), dtype=torch.int64)
        seen = int(curvature["seen"])
        GradientWindow(curvature["rows"], curvature["gram"], damping, k).replace_row(seen % k, row)
        curvature["seen"] += 1

    def apply(self, gradients: Sequence[Tensor], curvature: Curvature, damping: float) -> list[Tensor]:
        """K G'(GG' + k damping I)^-1 e for V = G'e, over the gradients that there are."""
        seen = int(curvature["seen"])
        filled = min(seen, self.gradients)
        window = GradientWindow(
            curvature["rows"][:filled],
            curvature["gram"][:filled, :filled],
            damping,
            self.gradients if self.mean_over_all else filled,
        )
        natural = window.solve_near((seen - 1) % self.gradients, _flat(gradients))
        parts = natural.split([each.numel() for each in gradients])
        return [part.view_as(each) for part, each in zip(parts, gradients, strict=True)]

    def state_bytes(self, sizes: Sequence[Size]) -> int:
        """The window, its inner products, and a count."""
        k, kept = self.gradients, self.storage or sizes[0].dtype
        numbers = sum(size.shape[0] * size.shape[1] for size in sizes)
        return k * numbers * kept.itemsize + k * k * sizes[0].dtype.itemsize + torch.int64.itemsize

    def cost(self, shapes: Sequence[tuple[int, int]]) -> float:
        """As many products as numbers."""
        return float(sum(m * n for m, n in shapes))


def _flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([each.flatten() for each in gradients])
