"""Stable rank: the squared Frobenius norm over the squared spectral norm."""

from dataclasses import dataclass

from torch import Tensor

from .spectral import SpectralMeasure


@dataclass(frozen=True)
class StableRank(SpectralMeasure):
    """How far one direction dominates: |W|_F^2 / |W|_2^2, between 1 and the rank; a zero matrix has 0.

    References: M. Rudelson, R. Vershynin, "Sampling from large matrices", 2007, arXiv math/0503442.

    >>> import torch
    >>> StableRank()(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), {})
    {'stable_rank': 1.25}
    """

    def of_spectrum(self, values: Tensor, shape: tuple[int, int]) -> dict[str, float | None]:
        """Measure an (m, n) weight by its singular values."""
        top = float(values[0])
        return {"stable_rank": float((values / top).square().sum()) if top > 0 else 0.0}
