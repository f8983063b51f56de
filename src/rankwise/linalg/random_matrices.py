"""Random matrices whose entries have a mean square of one."""

import torch
from torch import Generator, Tensor

from .orthonormal import orthonormal


def gaussian(rows: int, columns: int, generator: Generator) -> Tensor:
    """Return independent normal numbers (rows, columns).

    >>> gaussian(2, 3, torch.Generator().manual_seed(0)).shape
    torch.Size([2, 3])
    """
    return torch.randn(rows, columns, generator=generator)


def orthogonal(rows: int, columns: int, generator: Generator) -> Tensor:
    """Return a matrix (rows, columns) whose shorter side is an orthogonal set of vectors of equal length.

    >>> codes = orthogonal(8, 2, torch.Generator().manual_seed(0))
    >>> (codes.mT @ codes).round(decimals=4).abs().tolist()
    [[8.0, 0.0], [0.0, 8.0]]
    """
    drawn = gaussian(rows, columns, generator)
    basis = orthonormal(drawn) if rows >= columns else orthonormal(drawn.mT).mT
    return basis * max(rows, columns) ** 0.5
