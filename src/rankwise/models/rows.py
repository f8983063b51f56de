"""Some rows of a structured matrix, for those who cannot have all of them at once."""

import torch
from torch import Tensor

from ..matrices import (
    Base,
    Branch,
    Dense,
    Diagonal,
    Frozen,
    KeptColumn,
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
        case KeptColumn():
            rows, base = (rows_of(part, start, stop) for part in (matrix.matrix, matrix.base))
            return torch.cat(
                [rows[:, : matrix.column], base[:, [matrix.column]], rows[:, matrix.column + 1 :]], 1
            )
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
            lengths = matrix.row_lengths()
            factors = matrix.lengths / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)
            return factors[start:stop, None] * sums
        case _:
            units = torch.zeros(stop - start, matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
            units[:, start:stop].fill_diagonal_(1)
            return matrix.adjoint(units)


def rows_of_change(matrix: StructuredMatrix, start: int, stop: int) -> Tensor:
    """Return rows ``start`` ... ``stop`` - 1 of what an adapter adds to its matrix, in the widest type.

    Where it is a term of its own, nothing is subtracted.
    """
    if terms := terms_beside(matrix):
        return rows_of(Sum(*terms), start, stop)
    base = next((part for part in matrix.modules() if isinstance(part, Base)), None)
    if base is None:  # an adapter of rank 0 is not there
        return torch.zeros(stop - start, matrix.shape[1])
    return rows_of(matrix, start, stop) - rows_of(base, start, stop)


def terms_beside(matrix: StructuredMatrix) -> list[StructuredMatrix]:
    """Return what is added to a base, or nothing if an expression is no sum of one base and other terms."""
    if isinstance(matrix, KeptColumn):
        spared = torch.ones(matrix.shape[1]).index_fill(0, torch.tensor([matrix.column]), 0)
        terms = terms_beside(matrix.matrix)
        return [Product(term, Diagonal(spared.to(term.device, term.dtype))) for term in terms]
    parts = matrix.parts if isinstance(matrix, Sum) else []
    others = [part for part in parts if not isinstance(part, Base)]
    inside = any(isinstance(inner, Base) for part in others for inner in part.modules())
    return others if len(others) == len(parts) - 1 and not inside else []


def takes_any_type(matrix: StructuredMatrix) -> bool:
    """Whether :func:`rows_of` computes in the wide type of an adapter around a base of a narrow one."""
    if not all(isinstance(part.matrix, Dense) for part in matrix.modules() if isinstance(part, Base)):
        return False
    return bool(terms_beside(matrix)) or isinstance(matrix, RowNormalised)
