"""The power law that the largest eigenvalues of a weight follow, with its uncertainty."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .spectral import SpectralMeasure, nonzero

_SPAN = 1e-3  # a tail whose logarithms span less holds equal values up to rounding: no power law
_BLOCK = 256  # candidate tails compared at once


@dataclass(frozen=True)
class SpectrumTail(SpectralMeasure):
    """Exponent of the power law p(x) ~ x^-alpha in the tail of the eigenvalues x = s^2 of W'W.

    Every eigenvalue is tried as the start of the tail: alpha = 1 + k / sum ln(x / start) over its k
    eigenvalues, and the tail with the least Kolmogorov-Smirnov distance is taken. Also returned: the
    standard error (alpha - 1) / sqrt(k) and k. All three are None where no tail spans a range, as for
    an orthogonal matrix. Well-trained layers were found to have alpha between 2 and 6. Alpha also depends on
    the aspect ratio, so compare layers of one shape.

    Args:
        smallest: fewest eigenvalues of a tail.

    References: C. H. Martin, M. W. Mahoney, "Implicit self-regularization in deep neural networks", 2018,
        arXiv 1810.01075; A. Clauset, C. R. Shalizi, M. E. J. Newman, "Power-law distributions in
        empirical data", 2007, arXiv 0706.1062.
    """

    smallest: int = 10
    """With fewer the standard error passes a third of alpha - 1."""

    def __post_init__(self) -> None:
        if self.smallest < 2:
            raise ValueError(f"smallest must be at least 2, got {self.smallest}.")

    def of_spectrum(self, values: Tensor, shape: tuple[int, int]) -> dict[str, float | None]:
        """Measure an (m, n) weight by its singular values."""
        found = tail_fit(nonzero(values, shape).square(), self.smallest)
        alpha, count = found if found is not None else (None, None)
        sigma = None if alpha is None or count is None else (alpha - 1) / count**0.5
        return {"alpha": alpha, "alpha_sigma": sigma, "tail_values": count}


def tail_fit(eigenvalues: Tensor, smallest: int = 10) -> tuple[float, int] | None:
    """Fit a power law to the tail of positive numbers.

    Args:
        eigenvalues: (k,) positive, float64, in any order.
        smallest: fewest numbers of a tail.

    Returns:
        the exponent and the length of the tail, or None if no tail spans a range.
    """
    logs = eigenvalues.log().sort().values
    count = len(logs)
    sizes = torch.arange(count, 0, -1, dtype=torch.float64, device=logs.device)  # length of the tail from i on
    sums = logs.flip(0).cumsum(0).flip(0) - sizes * logs
    usable = (sizes >= smallest) & (logs[-1:] - logs > _SPAN)
    starts = usable.nonzero()[:, 0]
    if len(starts) == 0:
        return None
    alphas = 1 + sizes[starts] / sums[starts]
    rank = torch.arange(count, dtype=torch.float64, device=logs.device)
    distances = []
    for start, alpha in zip(starts.split(_BLOCK), alphas.split(_BLOCK), strict=True):
        law = 1 - ((1 - alpha)[:, None] * (logs - logs[start, None]).clamp_min(0)).exp()
        seen = (rank - start[:, None]) / sizes[start, None]
        distances.append((law - seen).abs().masked_fill(seen < 0, 0).amax(1))
    best = int(torch.cat(distances).argmin())
    return float(alphas[best]), int(sizes[starts[best]])
