"""Functions of two sets of points that give a number for each pair."""

from torch import Tensor

TINY = 1e-12  # added to squares of distances, so that a distance of zero has a gradient, of zero


def distance(left: Tensor, right: Tensor) -> Tensor:
    """Return the Euclidean distances (..., m, n) between points (..., m, w) and (..., n, w).

    Gradients are finite for all points, equal ones included, and their lengths are at most one.

    >>> import torch
    >>> distance(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]])).tolist()
    [[5.0, 1.0]]
    """
    squares = left.square().sum(-1)[..., :, None] + right.square().sum(-1)[..., None, :]
    return (squares - 2 * left @ right.mT).clamp_min(0).add(TINY).sqrt()


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner products (..., m, n) of vectors (..., m, w) and (..., n, w)."""
    return left @ right.mT
