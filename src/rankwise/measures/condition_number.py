"""Condition number of a weight, and its exact rank."""

from dataclasses import dataclass

from torch import Tensor

from .spectral import SpectralMeasure, nonzero


@dataclass(frozen=True)
class ConditionNumber(SpectralMeasure):
    """The numerical rank, and the largest singular value over the smallest; None if the rank is not full.

    >>> import torch
    >>> ConditionNumber()(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), {})
    {'rank': 2, 'condition': 4.0}
    """

    def of_spectrum(self, values: Tensor, shape: tuple[int, int]) -> dict[str, float | None]:
        """Measure an (m, n) weight by its singular values."""
        rank = len(nonzero(values, shape))
        return {"rank": rank, "condition": float(values[0] / values[-1]) if rank == len(values) else None}
