"""Matrices with orthonormal rows: directions along them, and Cayley's way from one to another."""

import torch
from torch import Tensor


def stiefel_tangent(values: Tensor, point: Tensor) -> Tensor:
    """Return the part of matrices (..., m, n) that is along matrices with orthonormal rows.

    With Q Q' = I to first order Q + X has orthonormal rows if X Q' + Q X' = 0. The nearest such X to G is
    G - sym(G Q') Q.

    Args:
        values: G (..., m, n).
        point: Q (..., m, n), m <= n.

    >>> stiefel_tangent(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]))
    tensor([[0., 4.]])
    """
    overlap = values @ point.mT
    return values - (overlap + overlap.mT) @ point / 2


def cayley(step: Tensor, point: Tensor) -> Tensor:
    """Return Q (I + A / 2) (I - A / 2)^-1 with the skew A for which Q A is a step along it.

    What is multiplied with is orthogonal, whatever the step: rows stay as orthonormal as they were. A has rank
    2 m, so that a system of 2 m equations is solved, not one of n.

    Args:
        step: (..., m, n), tangent; see :func:`stiefel_tangent`.
        point: Q (..., m, n), m <= n, of orthonormal rows.

    References: Wen and Yin, "A feasible method for optimization with orthogonality constraints", 2013.

    >>> cayley(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]]))
    tensor([[0., 1.]])
    """
    half = step - (step @ point.mT) @ point / 2
    left, right = torch.cat([half, point], -2), torch.cat([point, -half], -2)
    identity = torch.eye(left.shape[-2], dtype=left.dtype, device=left.device)
    return point + point @ right.mT @ torch.linalg.solve(identity - left @ right.mT / 2, left)
