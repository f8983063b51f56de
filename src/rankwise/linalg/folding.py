"""Symmetric matrices as one triangle."""

import torch
from torch import Tensor
from torch.nn.functional import pad


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
