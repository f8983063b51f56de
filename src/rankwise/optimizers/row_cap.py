"""Rows that may not be longer than a limit, for tables of embeddings."""

from dataclasses import dataclass

from torch import Tensor

from ..core.states import State
from ..core.transforms import Transform
from .constraint import Constraint, check_limit, of_matrices


@dataclass(frozen=True, kw_only=True)
class RowCap(Constraint):
    """Divide rows by max(1, their root mean square / limit).

    Args:
        limit: of the root mean square.
    """

    limit: float = 1.0

    def __post_init__(self) -> None:
        check_limit(self.limit)

    def constrain(self, param: Tensor, state: State, lr: float, weight_decay: float) -> Tensor:
        """(k, m, n) -> (k, m, n)."""
        size = param.square().mean(-1, keepdim=True).sqrt()
        return param / (size / self.limit).clamp_min(1)


def row_cap(*, limit: float = 1.0) -> Transform:
    """Keep the root mean square of each row of a matrix below a limit, as for a table of embeddings.

    >>> row_cap().matrix
    RowCap(limit=1.0)

    Args:
        limit: of the root mean square.

    References: Newhouse et al., 2025, arXiv 2507.13338.
    """
    return of_matrices(RowCap(limit=limit))
