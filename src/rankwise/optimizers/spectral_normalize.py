"""Weights divided by their norm where it is above a limit."""

from dataclasses import dataclass

from torch import Tensor

from ..core.states import State
from ..core.transforms import Transform
from ..linalg import spectral_bound
from .constraint import Limited, of_matrices, unit


@dataclass(frozen=True, kw_only=True)
class SpectralNormalize(Limited):
    """Divide matrices by max(1, norm / limit)."""

    def constrain(self, param: Tensor, state: State, lr: float, weight_decay: float) -> Tensor:
        """(k, m, n) -> (k, m, n), with norms up to ``limit``."""
        size = spectral_bound(param).view(-1, 1, 1)
        return param * (self.limit * unit(param) / size).clamp_max(1)


def spectral_normalize(*, limit: float) -> Transform:
    """Keep the norms of all matrices below a limit by shrinking a matrix as a whole.

    Norms are bounded from above (:func:`rankwise.linalg.spectral_bound`), so that the limit holds; power steps,
    which the paper takes, give norms that are too small. Matrices of many equal singular values end a little
    below.

    >>> spectral_normalize(limit=1.5).matrix
    SpectralNormalize(limit=1.5)

    Args:
        limit: of the norm from root mean square to root mean square, sqrt(n / m) times the largest singular
            value.

    References: Newhouse et al., 2025, arXiv 2507.13338; Miyato et al., 2018, arXiv 1802.05957.
    """
    return of_matrices(SpectralNormalize(limit=limit))
