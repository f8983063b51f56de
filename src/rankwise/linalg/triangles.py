"""Triangles of matrices without gaps: lower triangular ones in a row, symmetric ones in a rectangle."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

STEPS = 4  # pieces of a product with a triangular matrix: 5/8 of the multiply-adds remain
SMALL = 512  # sides up to this are multiplied whole


def transposed_product(lower: Tensor, x: Tensor) -> Tensor:
    """Return L' x of a lower triangular L (n, n) and x (n, k), without most of what is zero.

    >>> transposed_product(torch.tensor([[1.0, 0.0], [2.0, 3.0]]), torch.tensor([[1.0], [1.0]])).tolist()
    [[3.0], [3.0]]
    """
    n = len(lower)
    if n <= SMALL:
        return lower.mT @ x
    edges = [n * i // STEPS for i in range(STEPS + 1)]
    return torch.cat([lower[low:, low:high].mT @ x[low:] for low, high in pairwise(edges)])


def to_triangle(lower: Tensor) -> Tensor:
    """Return the r (r + 1) / 2 numbers of a lower triangular (r, r) matrix, row by row."""
    low, high = torch.tril_indices(*lower.shape, device=lower.device)
    return lower[low, high]


def from_triangles(numbers: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the block diagonal matrix of lower triangular ones whose numbers follow each other.

    >>> from_triangles(torch.tensor([1.0, 2.0, 3.0, 4.0]), [2, 0, 1]).tolist()
    [[1.0, 0.0, 0.0], [2.0, 3.0, 0.0], [0.0, 0.0, 4.0]]
    """
    blocks = []
    for size, part in zip(sizes, numbers.split([r * (r + 1) // 2 for r in sizes]), strict=True):
        low, high = torch.tril_indices(size, size, device=part.device)
        blocks.append(part.new_zeros(size, size).index_put((low, high), part))
    return torch.block_diag(*blocks)


def fold_symmetric(matrix: Tensor) -> Tensor:
    """Return the n (n + 1) / 2 numbers of a symmetric matrix (n, n) as (ceil(n / 2), n + 1 or n + 2) numbers.

    The short rows of the lower triangle stand, reversed, behind the long ones; an odd n is filled up by one row
    of zeros. Nothing waits for a device, as choosing by a mask does.

    >>> fold_symmetric(torch.tensor([[1.0, 2.0], [2.0, 3.0]]))
    tensor([[2., 3., 1.]])
    """
    odd = matrix.shape[-1] % 2
    lower = pad(matrix, (0, odd, 0, odd)).tril()
    half = lower.shape[-1] // 2
    return pad(lower[half:].flip(0), (0, 1)) + pad(lower[:half].flip(1), (1, 0))


def unfold_symmetric(folded: Tensor, side: int) -> Tensor:
    """Return the symmetric matrix (side, side), exactly so; undoes :func:`fold_symmetric`."""
    short, long = folded[:, 1:].flip(1).tril(), folded[:, :-1].flip(0).tril(len(folded))
    lower = torch.cat([short, long])[:side, :side]
    return lower + lower.tril(-1).mT
