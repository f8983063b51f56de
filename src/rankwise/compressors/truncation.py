"""What all truncated SVDs share: a metric on each side, and how the result is stored."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.choices import Choices
from ..core.statistics import Stats
from ..linalg import metric_svd, truncated_factors
from ..matrices import LowRank, PivotedLowRank, StructuredMatrix
from .quadratic import QuadraticError

Gauge = Literal["pivot", "factors"]
GAUGES: dict[Gauge, type[LowRank] | type[PivotedLowRank]] = {"pivot": PivotedLowRank, "factors": LowRank}


@dataclass(frozen=True, kw_only=True)
class TruncatedSvd(QuadraticError):
    """Offers the best matrix of every rank in the metric ``scale`` * tr(S D C D') of a change D of the weight.

    Args:
        gauge: how the result is stored: r rows or columns and how they make the others, or two factors.
        rank_multiple: offer only multiples of it, such as 16 or 32, for processors that prefer them.
    """

    gauge: Gauge = "pivot"
    rank_multiple: int = 1

    def __post_init__(self) -> None:
        if self.gauge not in GAUGES:
            raise ValueError(f"gauge must be one of {', '.join(GAUGES)}, got {self.gauge!r}.")
        if self.rank_multiple < 1:
            raise ValueError(f"rank_multiple must be >= 1, got {self.rank_multiple}.")

    def choices(self, weight: Tensor, stats: Stats) -> Choices:
        """Offer the ranks of an (m, n) weight."""
        m, n = weight.shape
        u, s = metric_svd(weight, *self.metrics(stats))
        u = u.to(torch.promote_types(weight.dtype, torch.float32))
        energy = self.scale * s.square()
        left_out = torch.cat([energy.flip(0).cumsum(0).flip(0)[1:], energy.new_zeros(1)])  # by rank - 1
        step = min(self.rank_multiple, len(s))
        ranks = torch.arange(step, len(s) + 1, step)
        kind = GAUGES[self.gauge]
        floats, indices = kind.stored(m, n, ranks)

        def build(i: int) -> StructuredMatrix:
            matrix = kind.from_factors(*truncated_factors(weight, self.metrics(stats)[0], u[:, : int(ranks[i])]))
            return matrix.to(weight.dtype)

        return Choices(
            costs={
                "params": floats + indices,
                "bytes": floats * weight.element_size() + 4 * indices,
                "macs": floats,
            },
            errors=left_out.cpu()[ranks - 1],
            total=float(energy.sum()),
            build=build,
            refit=lambda i, weight, stats: self.choices(weight, stats).build(i),
            error_of=self.error_of(stats),
            spectrum=energy.sqrt().cpu(),
        )
