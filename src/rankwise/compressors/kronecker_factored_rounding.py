"""Low-bit integers, chosen all together so that the loss changes little."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import Metric, Rounded, Splitting, choose_grids, nearest_codes
from .low_bit import LowBit

WEIGHTS = (0.1, 10.0)  # of the splitting: codes still move in the first step and no longer do in the last


@dataclass(frozen=True, kw_only=True)
class KroneckerFactoredRounding(LowBit):
    """Round the weight to integers of few bits, so that the loss changes little.

    The grids are those of :class:`Gptq`; the codes are searched in the whole metric 1/2 tr(S D C D'), so that
    errors make up for each other in other columns and in other rows.

    Args:
        bits: 1 ... 8; None offers 2, 3, 4, 5, 6 and 8.
        group: how many columns of a row share a scale and an offset.
        steps: of the search.
        input_shrinkage: see :class:`KroneckerFactoredSvd`.
        input_damping: see :class:`KroneckerFactoredSvd`.
        output_damping: see :class:`KroneckerFactoredSvd`.

    References: the search is the splitting of ALPS, arXiv 2406.07831, with a grid in place of a support; rounding
        in two metrics, with feedback, is YAQA's, Tseng et al., 2025, arXiv 2505.22988.
    """

    steps: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}.")

    def rounder(self, weight: Tensor, metrics: tuple[Metric, Metric]) -> Callable[[int], Rounded]:
        """Return what rounds an (m, n) weight to a number of bits, in the metrics S and C."""
        n = weight.shape[1]
        splitting = Splitting(weight, *metrics)
        importance = metrics[1].diagonal(n).to(weight.device)

        def rounded(bits: int) -> Rounded:
            grids = choose_grids(weight.double(), importance, bits, self.group, weight.dtype)
            scale, offset = (splitting.scaled(grid.repeat_interleave(self.group, 1)[:, :n]) for grid in grids)

            def project(x: Tensor) -> Tensor:
                return scale * nearest_codes(x, scale, offset, bits) + offset

            found = splitting.nearest(project, steps=self.steps, weights=WEIGHTS, start=splitting.target)
            codes = nearest_codes(found, scale, offset, bits).to(torch.uint8)
            return Rounded(codes, grids[0].to(weight.dtype), grids[1].to(weight.dtype), self.group)

        return rounded
