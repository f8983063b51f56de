"""Some rows or columns of a structured matrix, for those who cannot have all of them at once."""

import torch
from torch import Tensor

from ..matrices import (
    Base,
    Branch,
    Dense,
    Frozen,
    LowRank,
    RowNormalised,
    Scaled,
    Scheduled,
    StructuredMatrix,
    Sum,
)


def lines_of(matrix: StructuredMatrix, axis: int, start: int, stop: int) -> Tensor:
    """Return rows (axis 0) or columns (axis 1) of a matrix in their places, in the widest type of its parts."""
    match matrix:
        case Dense():
            return matrix.weight.narrow(axis, start, stop - start)
        case Base() | Frozen() | Scheduled():
            return lines_of(matrix.matrix, axis, start, stop)
        case LowRank() if axis == 0:
            return matrix.left[start:stop] @ matrix.right
        case LowRank():
            return matrix.left @ matrix.right[:, start:stop]
        case Branch() | Scaled():
            return matrix.scale * lines_of(matrix.matrix, axis, start, stop)
        case Sum():
            first, *others = (lines_of(part, axis, start, stop) for part in matrix.parts)
            for part in others:
                first = first + part
            return first
        case RowNormalised():
            sums = lines_of(matrix.base, axis, start, stop) + lines_of(matrix.update, axis, start, stop)
            lengths = matrix.row_lengths()
            factors = matrix.lengths / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)
            return (factors[start:stop] if axis == 0 else factors)[:, None] * sums
        case _ if axis == 0:
            units = torch.zeros(stop - start, matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
            units[:, start:stop].fill_diagonal_(1)
            return matrix.adjoint(units)
        case _:
            return matrix.lookup(torch.arange(start, stop, device=matrix.device)).mT


def takes_any_type(matrix: StructuredMatrix) -> bool:
    """Whether :func:`lines_of` computes in the wide type of an adapter around a base of a narrow one."""
    if not all(isinstance(part.matrix, Dense) for part in matrix.modules() if isinstance(part, Base)):
        return False
    beside = isinstance(matrix, Sum) and all(
        isinstance(part, Base) or not any(isinstance(inner, Base) for inner in part.modules())
        for part in matrix.parts
    )
    return beside or isinstance(matrix, RowNormalised)
