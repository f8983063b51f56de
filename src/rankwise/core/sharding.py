"""Parts of a structured matrix for several devices: some of its rows, or some of its columns.

Parts keep the structure where that is smaller than the part written out. What all parts need, such as one factor
of a low-rank matrix, each part holds whole.
"""

import math
from functools import singledispatch

import torch
from torch import Tensor

from ..linalg import unpack
from ..matrices import Dense, LowRank, PivotedLowRank, Product, Quantized, Scaled, Sparse, StructuredMatrix, Sum


def span(whole: int, part: int, rank: int, world: int) -> tuple[int, int]:
    """Return where the part of a device begins and ends.

    Where the parts of all devices are together more than the whole, neighbours hold the same part, as those of
    keys and values do when there are more devices than heads.

    Raises:
        ValueError: if the parts do not cover the whole evenly.

    >>> [span(8, 2, rank, 4) for rank in range(4)]
    [(0, 2), (2, 4), (4, 6), (6, 8)]
    >>> [span(4, 2, rank, 4) for rank in range(4)]
    [(0, 2), (0, 2), (2, 4), (2, 4)]
    """
    if not 0 <= rank < world or not 0 < part <= whole or (part * world) % whole:
        raise ValueError(
            f"{world} parts of {part} do not cover {whole} evenly for device {rank}; use fewer devices."
        )
    start = rank // (part * world // whole) * part
    return start, start + part


@singledispatch
def rows(matrix: StructuredMatrix, start: int, stop: int) -> StructuredMatrix:
    """Return rows of a matrix; those of all devices, one below the other, are the whole."""
    return Dense(matrix.dense().detach()[start:stop].clone())


@singledispatch
def columns(matrix: StructuredMatrix, start: int, stop: int) -> StructuredMatrix:
    """Return columns of a matrix; the outputs of all devices, added up, are those of the whole."""
    return Dense(matrix.dense().detach()[:, start:stop].clone())


@rows.register
def _(matrix: LowRank, start: int, stop: int) -> StructuredMatrix:
    return _low_rank(matrix.left[start:stop], matrix.right)


@columns.register
def _(matrix: LowRank, start: int, stop: int) -> StructuredMatrix:
    return _low_rank(matrix.left, matrix.right[:, start:stop])


@rows.register
def _(matrix: PivotedLowRank, start: int, stop: int) -> StructuredMatrix:
    if matrix.side == "rows":
        return _low_rank(matrix.factors()[0][start:stop], matrix.kept)
    return _shorter_lines(matrix, start, stop)


@columns.register
def _(matrix: PivotedLowRank, start: int, stop: int) -> StructuredMatrix:
    if matrix.side == "columns":
        return _low_rank(matrix.kept.mT, matrix.factors()[1][:, start:stop])
    return _shorter_lines(matrix, start, stop)


@rows.register
def _(matrix: Quantized, start: int, stop: int) -> StructuredMatrix:
    return Quantized(
        matrix.packed[start:stop].clone(),
        matrix.scale.detach()[start:stop].clone(),
        matrix.offset.detach()[start:stop].clone(),
        columns=matrix.shape[1],
        bits=matrix.bits,
        group=matrix.group,
    )


@columns.register
def _(matrix: Quantized, start: int, stop: int) -> StructuredMatrix:
    group = math.gcd(matrix.group, start)  # a part may begin within a group, which is then cut into smaller ones
    codes = unpack(matrix.packed, matrix.bits)[:, start:stop]
    own = torch.arange(start, stop, group, device=codes.device) // matrix.group
    return Quantized.from_codes(
        codes, matrix.scale.detach()[:, own], matrix.offset.detach()[:, own], bits=matrix.bits, group=group
    )


@rows.register
def _(matrix: Sparse, start: int, stop: int) -> StructuredMatrix:
    return Sparse.from_dense(matrix.dense().detach()[start:stop], matrix.mask()[start:stop])


@columns.register
def _(matrix: Sparse, start: int, stop: int) -> StructuredMatrix:
    return Sparse.from_dense(matrix.dense().detach()[:, start:stop], matrix.mask()[:, start:stop])


@rows.register
def _(matrix: Sum, start: int, stop: int) -> StructuredMatrix:
    return Sum(*[rows(part, start, stop) for part in matrix.parts])


@columns.register
def _(matrix: Sum, start: int, stop: int) -> StructuredMatrix:
    return Sum(*[columns(part, start, stop) for part in matrix.parts])


@rows.register
def _(matrix: Product, start: int, stop: int) -> StructuredMatrix:
    first, *others = matrix.parts
    dense = matrix.dense().detach()[start:stop]
    return _smaller(Product(rows(first, start, stop).to(dense.dtype), *others), dense)


@columns.register
def _(matrix: Product, start: int, stop: int) -> StructuredMatrix:
    *others, last = matrix.parts
    dense = matrix.dense().detach()[:, start:stop]
    return _smaller(Product(*others, columns(last, start, stop).to(dense.dtype)), dense)


@rows.register
def _(matrix: Scaled, start: int, stop: int) -> StructuredMatrix:
    return Scaled(rows(matrix.matrix, start, stop), matrix.scale)


@columns.register
def _(matrix: Scaled, start: int, stop: int) -> StructuredMatrix:
    return Scaled(columns(matrix.matrix, start, stop), matrix.scale)


def _smaller(part: StructuredMatrix, dense: Tensor) -> StructuredMatrix:
    return part if part.nbytes < dense.numel() * dense.element_size() else Dense(dense.clone())


def _low_rank(left: Tensor, right: Tensor) -> StructuredMatrix:
    """Keep two factors if they are smaller than their product."""
    if left.numel() + right.numel() < left.shape[0] * right.shape[1]:
        return LowRank(left.detach().clone(), right.detach().clone())
    return Dense((left @ right).detach())


def _shorter_lines(matrix: PivotedLowRank, start: int, stop: int) -> StructuredMatrix:
    """Cut every line to a part of its length; the combinations stay."""
    if matrix.rank <= stop - start:  # never more numbers than written out
        kept = matrix.kept.detach()[:, start:stop].clone()
        return PivotedLowRank(kept, matrix.mix.detach().clone(), matrix.order.clone(), matrix.side)
    left, right = matrix.factors()
    cut = left @ right[:, start:stop] if matrix.side == "rows" else left[start:stop] @ right
    return Dense(cut.detach().contiguous())
