"""Lower triangular matrices as the numbers on and below their diagonals."""

from collections.abc import Sequence

import torch
from torch import Tensor


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
