"""What methods share that store a weight in integers of few bits."""

import abc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.choices import Choices
from ..core.statistics import Stats
from ..linalg import Metric, Rounded, falling, log_parabola, metric_norm, round_to_grid
from ..matrices import Quantized, StructuredMatrix
from .loss_metric import LARGE, LossMetric

WIDTHS = (2, 3, 4, 5, 6, 8)
FITTED = (2, 4, 6)


@dataclass(frozen=True, kw_only=True)
class LowBit(LossMetric):
    """What methods share that store a weight in integers of few bits, some columns of a row to a group.

    The errors of large weights are predicted from those of three widths, unless they were rounded before.

    Args:
        bits: 1 ... 8; None offers 2, 3, 4, 5, 6 and 8.
        group: how many columns of a row share a scale and an offset.
    """

    bits: int | None = None
    group: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits is not None and self.bits not in range(1, 9):
            raise ValueError(f"bits must be 1 ... 8, got {self.bits}.")
        if self.group < 1:
            raise ValueError(f"group must be >= 1, got {self.group}.")

    @abc.abstractmethod
    def rounder(self, weight: Tensor, metrics: tuple[Metric, Metric]) -> Callable[[int], Rounded]:
        """Return what rounds an (m, n) weight to a number of bits, in the metrics S and C."""

    def quantized(self, rounded: Rounded, bits: int) -> Quantized:
        """Pack what :meth:`rounder` made."""
        codes, scale, offset = rounded.codes, rounded.scale, rounded.offset
        return Quantized.from_codes(codes, scale, offset, bits=bits, group=self.group)

    def choices(self, weight: Tensor, stats: Stats) -> Choices:
        """Offer several widths, or one."""
        m, n = weight.shape
        metrics = self.metrics(stats)
        rounded = self.rounder(weight, metrics)
        widths = WIDTHS if self.bits is None else (self.bits,)
        exact = widths if len(widths) == 1 or weight.numel() < LARGE else FITTED

        def measured(bits: int) -> float:
            return metric_norm(weight.double() - rounded(bits).dense().double(), *metrics)

        known = {bits: measured(bits) for bits in exact}
        fitted = torch.tensor([*known.values()], dtype=torch.float64)
        if exact is not widths and falling(fitted):  # each further bit halves the rounding
            errors = log_parabola(torch.tensor(exact), fitted, torch.tensor(widths))
        else:
            each = [known[bits] if bits in known else measured(bits) for bits in widths]
            errors = torch.tensor(each, dtype=torch.float64)
        floats, codes = torch.tensor([Quantized.stored(m, n, bits, self.group) for bits in widths]).unbind(1)

        def build(i: int, weight: Tensor, stats: Stats) -> StructuredMatrix:
            return self.quantized(self.rounder(weight, self.metrics(stats))(widths[i]), widths[i])

        return Choices(
            costs={
                "params": floats + m * n,
                "bytes": floats * weight.element_size() + codes,
                "macs": torch.full_like(floats, m * n),
            },
            errors=self.scale * errors,
            total=self.scale * metric_norm(weight, *metrics),
            build=lambda i: build(i, weight, stats),
            refit=build,
            error_of=self.error_of(stats),
        )


@dataclass(frozen=True, kw_only=True)
class Feedback(LowBit):
    """What methods share that round column by column.

    Args:
        feedback: whether later columns make up for the rounding of earlier ones; False rounds to nearest.
    """

    feedback: bool = True

    def rounder(self, weight: Tensor, metrics: tuple[Metric, Metric]) -> Callable[[int], Rounded]:
        """Return what rounds an (m, n) weight to a number of bits, in the metric C."""
        return lambda bits: round_to_grid(
            weight, metrics[1], bits=bits, group=self.group, dtype=weight.dtype, feedback=self.feedback
        )
