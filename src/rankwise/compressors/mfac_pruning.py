"""Dropping the weights that other weights can best make up for, by the gradients of a few batches (M-FAC)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ..core.choices import Choices
from ..core.methods import Compressor, check_count
from ..core.statistics import BatchGradients, Statistic, Stats
from ..linalg import GradientWindow, damage_of_each, grouped, saliency
from ..matrices import Sparse

KEPT = tuple(
    torch.linspace(-4.5, 5, 39).sigmoid().tolist()
)  # shares of the weights that are not zero: 0.01 ... 0.99
TINY = 1e-100  # stands for the curvature of weights that no longer matter at all
Update = Callable[[GradientWindow, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class MFacPruning(Compressor):
    """Drop the weights of least w_a^2 / (2 [F^-1]_aa), and let the others make up for them.

    F = G'G/k + damping I is made of the gradients of k batches, each of its summed loss, in blocks of
    neighbouring weights. The damage is that to the loss of a batch as F predicts it, comparable between layers.
    A budget of ``of="macs"`` counts kept weights alone: ``keep=0.1`` is then a sparsity of 90 %. Weights that are
    zero stay so: where a folded model is pruned again, F is that of the weights that are left. Doing so in
    several rounds, each with new gradients, matters more than all else (:func:`rankwise.compress_gradually`).

    The data's batches decide how many gradients there are, all of which are in memory. By default their labels
    are drawn from the model; the authors' are ``labels=rankwise.core.labels.given``.

    Args:
        damping: multiple of F's mean diagonal, so that neither the batches' size nor the layer's scale count. The
            authors' is 1e-5 for all layers, of gradients of mean losses.
        block: how many weights, row by row, know of each other. Larger blocks need more gradients: of all but k
            directions F says only that they are damped, and with many weights a block that is all it says of any.
        density: share of the weights that are not zero that a layer keeps; None offers 0.01 ... 0.99.
        update: of the weights that stay: :func:`rankwise.linalg.grouped`, of which the damage is predicted, or
            :func:`rankwise.linalg.independent` as the authors do, which does more.

    References: Frantar, Kurtic, Alistarh, "M-FAC: efficient matrix-free approximations of second-order
        information", NeurIPS 2021, arXiv 2107.03356; Singh and Alistarh, "WoodFisher: efficient second-order
        approximation for neural network compression", NeurIPS 2020, arXiv 2004.14340.
    """

    damping: float = 0.1
    block: int = 128
    density: float | None = None
    update: Update = grouped
    needs: ClassVar[tuple[type[Statistic], ...]] = (BatchGradients,)
    comparable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.damping < float("inf"):
            raise ValueError(f"damping must be a finite number > 0, got {self.damping}.")
        check_count("block", self.block)
        if not callable(self.update):
            raise ValueError(f"update must be rankwise.linalg.grouped or independent, got {self.update!r}.")
        if self.density is not None and not 0 < self.density < 1:
            raise ValueError(f"density must be > 0 and < 1, got {self.density}.")

    def choices(self, weight: Tensor, stats: Stats) -> Choices:
        """Offer one or many sizes."""
        (m, n), curvature = weight.shape, self.curvature(weight, stats)
        left = max(int((weight != 0).sum()), 1)
        shares = KEPT if self.density is None else (self.density,)
        counts = {max(round(share * left), 1) for share in shares} | ({left} if left < m * n else set())
        kept = torch.tensor(sorted(count for count in counts if count < m * n), dtype=torch.int64)

        def damage(change: Tensor) -> float:
            return float(curvature.quadratic(self._cut(change)).sum()) / 2

        cut, scores = self._cut(weight), saliency(curvature, self._cut(weight))
        added = self._joined(damage_of_each(curvature, cut, scores), weight).flatten()
        damages = added[self._joined(scores, weight).flatten().argsort(stable=True)].cumsum(0)
        numbers, bitmap = Sparse.stored(m, n, kept)
        return Choices(
            costs={
                "params": numbers + (bitmap + 1) // 2,
                "bytes": numbers * weight.element_size() + bitmap,
                "macs": numbers,
            },
            errors=damages[m * n - 1 - kept],
            total=damage(weight),
            build=lambda i: self._build(weight, stats, int(kept[i])),
            refit=lambda i, weight, stats: self._build(weight, stats, int(kept[i])),
            error_of=lambda change: float(self.curvature(weight, stats).quadratic(self._cut(change)).sum()) / 2,
        )

    def curvature(self, weight: Tensor, stats: Stats) -> GradientWindow:
        """F of the weights that are not zero, in blocks (b, k, B).

        Raises:
            ValueError: if all gradients are zero, and not because weights are.
        """
        left = weight != 0
        gradients = stats[BatchGradients].value() * left
        size = float(gradients.square().sum()) / (len(gradients) * max(int(left.sum()), 1))
        if size == 0 and bool(left.all()):
            raise ValueError("its gradients are zero; give other data.")
        rows = self._cut(gradients).transpose(0, 1)
        count, block = rows.shape[-2:]
        if count > block:  # as many rows as weights have the same G'G
            rows = torch.linalg.qr(rows, mode="r").R
        return GradientWindow.of(rows, damping=self.damping * max(size, TINY), count=count)

    def _cut(self, matrix: Tensor) -> Tensor:
        """See (..., m, n) as blocks (..., b, B), the last one filled up with zeros."""
        flat = matrix.double().flatten(-2)
        block = min(self.block, flat.shape[-1])
        return functional.pad(flat, (0, -flat.shape[-1] % block)).unflatten(-1, (-1, block))

    def _joined(self, blocks: Tensor, like: Tensor) -> Tensor:
        """Undo :func:`_cut` of one matrix."""
        return blocks.flatten()[: like.numel()].view(like.shape)

    def _build(self, weight: Tensor, stats: Stats, kept: int) -> Sparse:
        curvature, cut = self.curvature(weight, stats), self._cut(weight)
        order = self._joined(saliency(curvature, cut), weight).flatten().argsort(stable=True)
        dropped = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        dropped[order[:-kept]] = True
        change = self.update(curvature, cut, self._cut(dropped.view(weight.shape)).bool())
        values = weight.double() + self._joined(change, weight)
        return Sparse.from_dense(values.to(weight.dtype), ~dropped.view(weight.shape))
