"""The sum of a sparse and a low-rank matrix, fitted to a weight."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.choices import Choices
from ..core.statistics import Stats
from ..linalg import Metric, metric_norm, metric_svd, sparse_plus_low_rank
from ..matrices import IndexedSparse, PivotedLowRank, Sparse, StructuredMatrix, Sum
from .loss_metric import LossMetric

SHARES = (0.3, 0.45, 0.6, 0.75)
SPARSE_SHARES = (0.15, 0.6)


@dataclass(frozen=True, kw_only=True)
class SparsePlusLowRank(LossMetric):
    """Write the weight as a low-rank matrix plus some single entries, so that the loss changes little.

    The low-rank term is kept in the pivot gauge. The entries are kept with a bitmap of their places, 16 of whose
    bits count as one number, or with an index for each, whichever is smaller.

    Args:
        share: of its dense size that a layer takes; None offers 0.3, 0.45, 0.6 and 0.75.
        sparse_share: of these numbers, how many the sparse term takes; None offers 0.15 and 0.6.
        steps: turns of fitting one term to what the other leaves.
        input_shrinkage: see :class:`KroneckerFactoredSvd`.
        input_damping: see :class:`KroneckerFactoredSvd`.
        output_damping: see :class:`KroneckerFactoredSvd`.

    References: the structure is SLTrain's, Han et al., NeurIPS 2024, arXiv 2406.02214, which trains it from
        scratch on random places (:class:`rankwise.starts.SparsePlusLowRankStart`).
    """

    share: float | None = None
    sparse_share: float | None = None
    steps: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in {"share": self.share, "sparse_share": self.sparse_share}.items():
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name} must be > 0 and < 1, got {value}.")
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}.")

    def choices(self, weight: Tensor, stats: Stats) -> Choices:
        """Offer several pairs of rank and density."""
        m, n = weight.shape
        metrics = self.metrics(stats)
        shares = SHARES if self.share is None else [self.share]
        parts = SPARSE_SHARES if self.sparse_share is None else [self.sparse_share]
        sizes = [size for share in shares for part in parts if (size := _size(m, n, share, part)) is not None]
        sizes = list(dict.fromkeys(sizes))
        first = metric_svd(weight, *metrics)[0] if sizes else None

        def fit(
            i: int, weight: Tensor, metrics: tuple[Metric, Metric], first: Tensor | None = None
        ) -> StructuredMatrix:
            rank, kept = sizes[i]
            left, right, sparse, mask = sparse_plus_low_rank(
                weight, *metrics, rank=rank, kept=kept, steps=self.steps, first=first
            )
            return Sum(PivotedLowRank.from_factors(left, right), _storage(m, n, kept).from_dense(sparse, mask))

        errors = [
            metric_norm(weight - fit(i, weight, metrics, first).dense().detach(), *metrics)
            for i in range(len(sizes))
        ]
        ranks, kept = torch.tensor(sizes, dtype=torch.int64).view(-1, 2).unbind(1)
        floats, indices = PivotedLowRank.stored(m, n, ranks)
        floats = floats + kept
        places = torch.tensor([_places(m, n, k) for k in kept.tolist()], dtype=torch.int64).view(-1, 2)
        return Choices(
            costs={
                "params": floats + indices + places[:, 0],
                "bytes": floats * weight.element_size() + 4 * indices + places[:, 1],
                "macs": floats,
            },
            errors=self.scale * torch.tensor(errors, dtype=torch.float64),
            total=self.scale * metric_norm(weight, *metrics),
            build=lambda i: fit(i, weight, self.metrics(stats), first).to(weight.dtype),
            refit=lambda i, weight, stats: fit(i, weight, self.metrics(stats)).to(weight.dtype),
            error_of=self.error_of(stats),
        )


def _storage(m: int, n: int, kept: int) -> type[Sparse] | type[IndexedSparse]:
    """Return the smaller of two ways to store so many entries."""
    few = torch.tensor(kept)
    indexed, bitmap = IndexedSparse.stored(m, n, few)[1], -(-Sparse.stored(m, n, few)[1] // 2)
    return IndexedSparse if int(indexed) < int(bitmap) else Sparse


def _places(m: int, n: int, kept: int) -> tuple[int, int]:
    """How many numbers, and bytes, the places of the entries count."""
    few = torch.tensor(kept)
    if _storage(m, n, kept) is IndexedSparse:
        _, numbers, size = IndexedSparse.stored(m, n, few)
        return int(numbers), int(size)
    size = int(Sparse.stored(m, n, few)[1])
    return (size + 1) // 2, size


def _size(m: int, n: int, share: float, part: float) -> tuple[int, int] | None:
    """Return the rank and the number of entries that fill a share of the dense size; None if one is 0."""
    numbers = int(share * m * n)
    kept = _largest(m * n, lambda k: k + _places(m, n, k)[0], int(part * numbers))
    if kept < 1:
        return None
    left = numbers - kept - _places(m, n, kept)[0]
    rank = _largest(min(m, n), lambda r: _numbers(PivotedLowRank.stored(m, n, torch.tensor(r))), left)
    return None if rank < 1 else (rank, kept)


def _numbers(stored: tuple[Tensor, Tensor]) -> int:
    return sum(int(each) for each in stored)


def _largest(most: int, cost: Callable[[int], int], budget: int) -> int:
    """Return the largest count up to ``most`` whose cost is within a budget; 0 if 1 costs too much."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    return low
