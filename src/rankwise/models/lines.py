"""Some rows or columns of a structured matrix, for those who cannot have all of them at once."""

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
from ..matrices.expressions import beside_base


def lines_of(matrix: StructuredMatrix, axis: int, start: int, stop: int) -> Tensor:
    """Return rows (axis 0) or columns (axis 1) of a matrix in their places, in the widest type of its parts."""
    match matrix:
        case Dense():
            return matrix.weight.narrow(axis, start, stop - start)
        case Base() | Frozen() | Scheduled():
            return lines_of(matrix.matrix, axis, start, stop)
        case KeptColumn():
            lines, base = (lines_of(part, axis, start, stop) for part in (matrix.matrix, matrix.base))
            place = matrix.column - (start if axis else 0)
            if not 0 <= place < lines.shape[1]:
                return lines
            return torch.cat([lines[:, :place], base[:, [place]], lines[:, place + 1 :]], 1)
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
            factors = matrix.factors()
            return (factors[start:stop] if axis == 0 else factors)[:, None] * sums
        case _ if axis == 0:
            units = torch.zeros(stop - start, matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
            units[:, start:stop].fill_diagonal_(1)
            return matrix.adjoint(units)
        case _:
            return matrix.lookup(torch.arange(start, stop, device=matrix.device)).mT


def lines_of_change(matrix: StructuredMatrix, axis: int, start: int, stop: int) -> Tensor:
    """Return the same lines of what an adapter adds to its matrix, in the widest type of its parts.

    Where it is a term of its own, nothing is subtracted.
    """
    if terms := terms_beside(matrix):
        return lines_of(Sum(*terms), axis, start, stop)
    base = next((part for part in matrix.modules() if isinstance(part, Base)), None)
    if base is None:  # an adapter of rank 0 is not there
        shape = [*matrix.shape]
        shape[axis] = stop - start
        return torch.zeros(shape)
    return lines_of(matrix, axis, start, stop) - lines_of(base, axis, start, stop)


def terms_beside(matrix: StructuredMatrix) -> list[StructuredMatrix]:
    """Return what is added to a base, or nothing if an expression is no sum of one base and other terms."""
    if isinstance(matrix, KeptColumn):
        spared = torch.ones(matrix.shape[1]).index_fill(0, torch.tensor([matrix.column]), 0)
        terms = terms_beside(matrix.matrix)
        return [Product(term, Diagonal(spared.to(term.device, term.dtype))) for term in terms]
    others = beside_base(matrix)
    inside = any(isinstance(inner, Base) for part in others for inner in part.modules())
    return [] if inside else others


def takes_any_type(matrix: StructuredMatrix) -> bool:
    """Whether :func:`lines_of` computes in the wide type of an adapter around a base of a narrow one."""
    if not all(isinstance(part.matrix, Dense) for part in matrix.modules() if isinstance(part, Base)):
        return False
    return bool(terms_beside(matrix)) or isinstance(matrix, RowNormalised)
