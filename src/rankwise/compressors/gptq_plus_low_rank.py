"""Low-bit integers, and a low-rank correction of what the rounding lost."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.choices import Choices
from ..core.statistics import Stats
from ..linalg import metric_norm, metric_svd, truncated_factors
from ..matrices import LowRank, Quantized, StructuredMatrix, Sum
from .low_bit import Feedback


@dataclass(frozen=True, kw_only=True)
class GptqPlusLowRank(Feedback):
    """Round the weight as :class:`Gptq` does, and add the best matrix of low rank for the loss to the result.

    Args:
        bits: 1 ... 8; None offers 2, 3 and 4.
        group: how many columns of a row share a scale and an offset.
        feedback: whether later columns make up for the rounding of earlier ones; False rounds to nearest.
        largest: largest rank, as a share of the full one.
        rank_multiple: offer only multiples of it.
        input_shrinkage: see :class:`KroneckerFactoredSvd`.
        input_damping: see :class:`KroneckerFactoredSvd`.
        output_damping: see :class:`KroneckerFactoredSvd`.

    References: Yao et al., "ZeroQuant-V2" (low-rank compensation), 2023, arXiv 2303.08302; Zhang et al., "LQER",
        ICML 2024, arXiv 2402.02446. Here the residual is truncated in the metric of the loss.
    """

    largest: float = 0.25
    rank_multiple: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.largest <= 1:
            raise ValueError(f"largest must be > 0 and <= 1, got {self.largest}.")
        if self.rank_multiple < 1:
            raise ValueError(f"rank_multiple must be >= 1, got {self.rank_multiple}.")

    def choices(self, weight: Tensor, stats: Stats) -> Choices:
        """Offer several widths, each with several ranks."""
        m, n = weight.shape
        metrics = self.metrics(stats)
        full = min(m, n)
        step = min(self.rank_multiple, full)
        ranks = torch.arange(step, max(int(self.largest * full), step) + 1, step)
        kind, errors, floats, codes = [], [], [], []
        for bits in [2, 3, 4] if self.bits is None else [self.bits]:
            residual = weight.double() - self.rounder(weight, metrics)(bits).dense().double()
            u, s = metric_svd(residual, *metrics)
            u = u[:, : int(ranks[-1])].to(torch.promote_types(weight.dtype, torch.float32))
            energy = self.scale * s.square()
            errors.append(torch.stack([energy[r:].sum() for r in ranks.tolist()]))
            numbers, packed = Quantized.stored(m, n, bits, self.group)
            floats.append(numbers + LowRank.stored(m, n, ranks)[0])
            codes.append(torch.full_like(ranks, packed))
            kind += [(bits, u, r) for r in ranks.tolist()]

        def build(i: int, weight: Tensor, stats: Stats, directions: Tensor | None = None) -> StructuredMatrix:
            bits, _, r = kind[i]
            metrics = self.metrics(stats)
            rounded = self.rounder(weight, metrics)(bits)
            residual = weight.double() - rounded.dense().double()
            u = metric_svd(residual, *metrics)[0] if directions is None else directions
            factors = truncated_factors(residual, metrics[0], u[:, :r])
            return Sum(self.quantized(rounded, bits), LowRank.from_factors(*factors).to(weight.dtype))

        numbers = torch.cat(floats)
        return Choices(
            costs={
                "params": numbers + m * n,
                "bytes": numbers * weight.element_size() + torch.cat(codes),
                "macs": m * n + LowRank.stored(m, n, ranks)[0].repeat(len(floats)),
            },
            errors=torch.cat(errors).cpu(),
            total=self.scale * metric_norm(weight, *metrics),
            build=lambda i: build(i, weight, stats, kind[i][1]),
            refit=build,
            error_of=self.error_of(stats),
        )
