"""Some rows of a structured matrix, for those who cannot have all of them at once."""

import torch
from torch import Tensor

from ..matrices import (
    Base,
    Branch,
    Dense,
    Frozen,
    LowRank,
    Product,
    RowNormalised,
    Scaled,
    Scheduled,
    StructuredMatrix,
    Sum,
)


def rows_of(matrix: StructuredMatrix, start: int, stop: int) -> Tensor:
    """Return rows ``start`` ... ``stop`` - 1 of a matrix, in the widest type of its parts."""
    match matrix:
        case Dense():
            return matrix.weight[start:stop]
        case Base() | Frozen() | Scheduled():
            return rows_of(matrix.matrix, start, stop)
        case LowRank():
            return matrix.left[start:stop] @ matrix.right
        case Branch() | Scaled():
            return matrix.scale * rows_of(matrix.matrix, start, stop)
        case Sum():
            first, *others = (rows_of(part, start, stop) for part in matrix.parts)
            for part in others:
                first = first + part
            return first
        case Product():
            rows = rows_of(matrix.parts[0], start, stop)
            for part in matrix.parts[1:]:
                rows = part.adjoint(rows)
            return rows
        case RowNormalised():
            sums = rows_of(matrix.base, start, stop) + rows_of(matrix.update, start, stop)
            return matrix.factors()[start:stop, None] * sums
        case _:
            units = torch.zeros(stop - start, matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
            units[:, start:stop].fill_diagonal_(1)
            return matrix.adjoint(units)


def takes_any_type(matrix: StructuredMatrix) -> bool:
    """Whether :func:`rows_of` computes in the wide type of an adapter around a base of a narrow one."""
    if not all(isinstance(part.matrix, Dense) for part in matrix.modules() if isinstance(part, Base)):
        return False
    beside = isinstance(matrix, Sum) and all(
        isinstance(part, Base) or not any(isinstance(inner, Base) for inner in part.modules())
        for part in matrix.parts
    )
    return beside or isinstance(matrix, RowNormalised)
