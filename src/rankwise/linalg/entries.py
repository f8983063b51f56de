"""Least squares over some entries of a matrix, the others being zero."""

import torch
from torch import Tensor


def fit_entries(
    moment: Tensor, mask: Tensor, left: Tensor | None, right: Tensor | None, start: Tensor, *, steps: int
) -> Tensor:
    """Approach the least tr(L Z R Z') - 2 tr(Z' B) over the Z (m, k) that are zero outside a mask.

    With B = L T R this is the Z nearest to T, in the metric tr(L D R D') of D = T - Z. Conjugate gradients with
    the diagonals of L and R as preconditioner; no step increases the error.

    Args:
        moment: B (m, k).
        mask: (m, k), true or 1 where Z may be other than zero.
        left: L (m, m), the diagonal (m,) of one, or None for the identity; positive semi-definite.
        right: R (k, k), the diagonal (k,) of one, or None; positive semi-definite.
        start: (m, k), zero outside the mask.
        steps: of conjugate gradients; rank-many solve the problem exactly.

    >>> import torch
    >>> b, r = torch.tensor([[4.0, 3.0]]), torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    >>> fit_entries(b, torch.tensor([[True, False]]), None, r, torch.zeros(1, 2), steps=1).tolist()
    [[2.0, 0.0]]
    """
    mask = mask.to(moment.dtype)
    size = _diagonal(left, moment, 0)[:, None] * _diagonal(right, moment, 1)
    size = torch.where(size > 0, size, torch.ones_like(size))
    values = start
    residual = mask * (moment - between(left, start, right))
    step = residual / size
    power = (residual * step).sum()
    for _ in range(steps):
        image = mask * between(left, step, right)
        curvature = (step * image).sum()
        if not power > 0 or not curvature > 0:
            break
        length = power / curvature
        values, residual = values + length * step, residual - length * image
        scaled = residual / size
        power, before = (residual * scaled).sum(), power
        step = scaled + power / before * step
    return values


def between(left: Tensor | None, x: Tensor, right: Tensor | None) -> Tensor:
    """Return L x R, where L and R are matrices, diagonals, or None for the identity."""
    if left is not None:
        x = left[:, None] * x if left.dim() == 1 else left @ x
    if right is not None:
        x = x * right if right.dim() == 1 else x @ right
    return x


def _diagonal(metric: Tensor | None, like: Tensor, axis: int) -> Tensor:
    if metric is None:
        return like.new_ones(like.shape[axis])
    return metric if metric.dim() == 1 else metric.diagonal()
