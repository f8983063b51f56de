"""Singular values above a limit brought to it, by polynomials."""

from dataclasses import dataclass

from torch import Tensor

from ..core.states import State
from ..core.transforms import Transform
from ..linalg import odd_polynomials, odd_range, spectral_bound
from .constraint import Limited, of_matrices, unit

CLIP = (
    (0.805032, 0.206361, -0.019763),
    (0.649867, 0.162935, -0.011150),
    (1.810259, -0.200265, 0.008251),
    (1.004384, -0.183490, 0.014413),
)
"""Nearly min(1, s) for s up to 3 (Newhouse et al. 2025)."""
REACH = 3.0


@dataclass(frozen=True, kw_only=True)
class HardCap(Limited):
    """Take singular values s to nearly min(limit, s), and never above the limit."""

    def constrain(self, param: Tensor, state: State, lr: float, weight_decay: float) -> Tensor:
        """(k, m, n) -> (k, m, n), with norms up to ``limit``."""
        limit = self.limit * unit(param)
        size = spectral_bound(param).view(-1, 1, 1)
        inside = param * (REACH * limit / size).clamp_max(1)
        capped = odd_polynomials(inside / limit, CLIP) * (limit / odd_range(CLIP, REACH)[1])
        return capped.where(size > limit, param)


def hard_cap(*, limit: float) -> Transform:
    """Keep the norms of all matrices below a limit by cutting singular values off, nearly.

    Where a norm may be above the limit, four polynomials of degree five stand for min(limit, s), divided by
    their largest value, so that the limit holds; they are wrong by up to 5 % of it. Norms above three times the
    limit are shrunk first.

    >>> hard_cap(limit=2.0).matrix
    HardCap(limit=2.0)

    Args:
        limit: of the norm from root mean square to root mean square, sqrt(n / m) times the largest singular
            value.

    References: Newhouse et al., 2025, arXiv 2507.13338, where the cap acts at each step and is not divided.
    """
    return of_matrices(HardCap(limit=limit))
