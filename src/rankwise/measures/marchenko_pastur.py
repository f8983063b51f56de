"""The part of a spectrum that looks like noise, and what stands out of it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .spectral import SpectralMeasure


@dataclass(frozen=True)
class MarchenkoPastur(SpectralMeasure):
    """How much of the spectrum is what independent random entries would give.

    The noise is the standard deviation of an entry for which the Marchenko-Pastur law has the median of
    the eigenvalues, which a few spikes do not move. ``spikes`` counts eigenvalues above the largest
    one that noise so large gives in 99 of 100 matrices (Tracy-Widom law); as the noise is estimated, small
    matrices have one more often. ``soft_rank`` is the upper edge of the
    noise over the largest eigenvalue: about 1 for noise, near 0 where structure dominates. A matrix
    more than half of whose eigenvalues are zero has None.

    References: V. Marchenko, L. Pastur, 1967; I. M. Johnstone, "On the distribution of the largest
        eigenvalue in principal components analysis", 2001; M. Gavish, D. L. Donoho, "The optimal hard
        threshold for singular values is 4/sqrt(3)", 2013, arXiv
        1305.5870.
    """

    def of_spectrum(self, values: Tensor, shape: tuple[int, int]) -> dict[str, float | None]:
        """Measure an (m, n) weight by its singular values."""
        short, long = min(shape), max(shape)
        eigenvalues = values.square()
        variance = float(eigenvalues.quantile(0.5)) / (long * median(short / long))
        if variance <= 0:
            return {"noise": None, "spikes": None, "soft_rank": None}
        roots = math.sqrt(long - 1) + math.sqrt(short)
        width = roots * (1 / math.sqrt(max(long - 1, 1)) + 1 / math.sqrt(short)) ** (1 / 3)
        limit = variance * (roots**2 + 2.023 * width)  # 2.023: 99 % point of the Tracy-Widom law
        edge = variance * long * (1 + math.sqrt(short / long)) ** 2
        return {
            "noise": math.sqrt(variance),
            "spikes": int((eigenvalues > limit).sum()),
            "soft_rank": edge / float(eigenvalues[0]),
        }


def median(ratio: float) -> float:
    """Return the median of the Marchenko-Pastur law with variance 1 and ratio short/long in (0, 1].

    >>> round(median(1.0), 3), round(median(1e-6), 3)
    (0.653, 1.0)
    """
    steps = 20_000
    angle = (torch.arange(steps, dtype=torch.float64) + 0.5) * (math.pi / steps)
    x = 1 + ratio - 2 * math.sqrt(ratio) * angle.cos()  # from the lower to the upper edge
    mass = (angle.sin().square() / x).cumsum(0)
    return float(x[int((mass >= mass[-1] / 2).nonzero()[0])])
