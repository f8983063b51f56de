"""What methods share that store a weight in integers of few bits."""

from dataclasses import dataclass

from torch import Tensor

from ..linalg import Metric, Rounded, round_to_grid
from ..matrices import Quantized
from .loss_metric import LossMetric


@dataclass(frozen=True, kw_only=True)
class LowBit(LossMetric):
    """What methods share that store a weight in integers of few bits, some columns of a row to a group.

    Args:
        bits: 1 ... 8; None offers several.
        group: how many columns of a row share a scale and an offset.
        feedback: whether later columns make up for the rounding of earlier ones; False rounds to nearest.
    """

    bits: int | None = None
    group: int = 64
    feedback: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits is not None and self.bits not in range(1, 9):
            raise ValueError(f"bits must be 1 ... 8, got {self.bits}.")
        if self.group < 1:
            raise ValueError(f"group must be >= 1, got {self.group}.")

    def rounded(self, weight: Tensor, inputs: Metric, bits: int) -> Rounded:
        """Round an (m, n) weight in the metric C."""
        return round_to_grid(
            weight, inputs, bits=bits, group=self.group, dtype=weight.dtype, feedback=self.feedback
        )

    def quantized(self, rounded: Rounded, bits: int) -> Quantized:
        """Pack what :meth:`rounded` returned."""
        codes, scale, offset = rounded.codes, rounded.scale, rounded.offset
        return Quantized.from_codes(codes, scale, offset, bits=bits, group=self.group)
