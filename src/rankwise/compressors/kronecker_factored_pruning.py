"""A few entries of the weight, chosen and refitted so that the loss changes little."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.choices import Choices
from ..core.statistics import Stats
from ..linalg import Splitting, largest, log_linear, log_parabola, metric_norm
from ..matrices import Sparse, StructuredMatrix
from .loss_metric import LARGE, LossMetric

SHARES = tuple(i / 40 for i in range(6, 39))  # 0.15 ... 0.95
FITTED = (0.2, 0.55, 0.9)
PLACES = 5
CHANCE = 0.99  # share of entries that are not zero above which the others are so by chance
WEIGHTS = (0.05, 5.0)  # of the splitting: places still move in the first step and no longer do in the last


@dataclass(frozen=True, kw_only=True)
class KroneckerFactoredPruning(LossMetric):
    """Set entries of the weight to zero and refit the others, so that the loss changes little.

    Stored are the kept entries and a bitmap of their places, 16 of whose bits count as one number. Many sizes
    are offered; the errors of large weights are predicted from fits at a few of them.

    Args:
        share: of its dense size that a layer takes; None offers 0.15 ... 0.95.
        steps: of the search for the places.
        solves: steps of conjugate gradients that refit the values.
        input_shrinkage: see :class:`KroneckerFactoredSvd`.
        input_damping: see :class:`KroneckerFactoredSvd`.
        output_damping: see :class:`KroneckerFactoredSvd`.

    References: Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language
        Models", NeurIPS 2024, arXiv 2406.07831, which searches so with S = I; Frantar and Alistarh, "SparseGPT",
        ICML 2023, arXiv 2301.00774. Entries are shared out between layers by the allocator.
    """

    share: float | None = None
    steps: int = 8
    solves: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(f"share must be > 0 and < 1, got {self.share}.")
        for name in ("steps", "solves"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}.")

    def choices(self, weight: Tensor, stats: Stats) -> Choices:
        """Offer one or many sizes."""
        metrics = self.metrics(stats)
        splitting = Splitting(weight, *metrics)
        m, n = weight.shape
        bitmap = int(Sparse.stored(m, n, torch.zeros(1))[1])

        def entries(share: float) -> int:
            return max(int(share * (m * n)) - (bitmap + 1) // 2, 1)

        kept = sorted({entries(share) for share in (SHARES if self.share is None else (self.share,))})
        numbers, there = torch.tensor(kept), int(weight.count_nonzero())
        there = m * n if there > CHANCE * m * n else there
        less = numbers < there  # of as many entries as there are the error is zero
        errors = torch.zeros(len(kept), dtype=torch.float64)
        errors[less] = self._errors(splitting, numbers[less], there, [entries(share) for share in FITTED])
        return Choices(
            costs={
                "params": numbers + (bitmap + 1) // 2,
                "bytes": numbers * weight.element_size() + bitmap,
                "macs": numbers,
            },
            errors=self.scale * errors,
            total=self.scale * metric_norm(weight, *metrics),
            build=lambda i: self._build(weight, stats, kept[i]),
            refit=lambda i, weight, stats: self._build(weight, stats, kept[i]),
            error_of=self.error_of(stats),
        )

    def _errors(self, splitting: Splitting, kept: Tensor, there: int, fitted: list[int]) -> Tensor:
        """Return the errors of (k,) increasing numbers of entries, most of them predicted if the weight is large.

        The logarithm of the error is near a parabola over the logit of what is removed. Of a weight that was
        pruned before, whose small entries are gone, it is not, and lines between more points are taken.

        Args:
            splitting: of the weight.
            kept: numbers of entries, fewer than there are.
            there: how many are not zero.
            fitted: where the parabola is fitted.
        """

        def measured(counts: list[int]) -> Tensor:
            errors = [splitting.error(self._fit(splitting, count)[0]) for count in counts]
            return torch.tensor(errors, dtype=torch.float64)

        def place(counts: Tensor) -> Tensor:
            return -(1 - counts.double() / there).logit()

        size = splitting.target.numel()
        if size < LARGE or len(kept) <= PLACES:
            return measured(kept.tolist())
        if there == size:
            return log_parabola(place(torch.tensor(fitted)), measured(fitted), place(kept))
        some = kept[torch.linspace(0, len(kept) - 1, PLACES).round().long()]
        return log_linear(place(some), measured(some.tolist()), place(kept))

    def _fit(self, splitting: Splitting, kept: int) -> tuple[Tensor, Tensor]:
        """Return the values, scaled, and the mask of their places."""

        def project(x: Tensor) -> Tensor:
            return x * largest(x.abs(), kept)

        start = splitting.nearest(project, steps=self.steps, weights=WEIGHTS, start=splitting.target)
        mask = largest(start.abs(), kept)
        return splitting.refit(mask, start, self.solves), mask

    def _build(self, weight: Tensor, stats: Stats, kept: int) -> StructuredMatrix:
        splitting = Splitting(weight, *self.metrics(stats))
        values, mask = self._fit(splitting, kept)
        return Sparse.from_dense(splitting.plain(values).to(weight.dtype), mask)
