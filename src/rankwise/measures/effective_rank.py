"""Effective rank: how many directions a weight uses, by the entropy of its spectrum."""

from dataclasses import dataclass

from torch import Tensor

from .spectral import SpectralMeasure, nonzero


@dataclass(frozen=True)
class EffectiveRank(SpectralMeasure):
    """How many directions the weight uses: exp of the entropy of its normalised singular values.

    With p = s / sum(s) it is exp(-sum p ln p), between 1 and the rank; a matrix with k equal singular
    values has k. A zero matrix has 0.

    References: O. Roy, M. Vetterli, "The effective rank: a measure of effective dimensionality", 2007.

    >>> import torch
    >>> EffectiveRank()(torch.eye(4), {})
    {'effective_rank': 4.0}
    """

    def of_spectrum(self, values: Tensor, shape: tuple[int, int]) -> dict[str, float | None]:
        """Measure an (m, n) weight by its singular values."""
        kept = nonzero(values, shape)
        share = kept / kept.sum()
        return {"effective_rank": float((-share * share.log()).sum().exp()) if len(kept) else 0.0}
