"""The largest singular value: bounded from above by products alone, or followed by power steps."""

import torch
from torch import Tensor


def spectral_bound(values: Tensor, squarings: int = 5) -> Tensor:
    """Return upper bounds, but for rounding, of the largest singular values of matrices (..., m, n).

    For the Gram matrix G of the shorter side s, G^p with p = 2^squarings has |G^p|_F >= (largest value)^(2 p),
    and its root is at most s^(1 / (4 p)) times too large: by 3 % for 64 equal singular values and p = 32, and
    by nothing where one is much larger than the others.

    Args:
        values: (..., m, n), finite.
        squarings: products of (s, s) matrices.

    >>> round(float(spectral_bound(torch.diag(torch.tensor([3.0, 1.0])))), 4)
    3.0
    """
    largest = values.abs().amax((-2, -1), keepdim=True)  # divided by, as powers would leave the range of numbers
    largest = largest.where(largest > 0, 1)
    x = (values.mT if values.shape[-2] > values.shape[-1] else values) / largest
    power, logarithm, tiny = x @ x.mT, torch.zeros_like(x[..., 0, 0]), torch.finfo(x.dtype).tiny
    for i in range(squarings + 1):
        size = torch.linalg.matrix_norm(power, keepdim=True).clamp_min(tiny)
        logarithm = logarithm + size[..., 0, 0].log() / 2**i
        power = power / size
        if i < squarings:
            power = power @ power
    return largest[..., 0, 0] * (logarithm / 2).exp()


def leading_pair(values: Tensor, right: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Improve the leading right singular vectors (..., n) of (..., m, n) by power steps.

    Returns:
        left vectors (..., m), singular values (...), which are never above the true ones, and right vectors
        (..., n); of a zero matrix, zeros.
    """
    tiny, left = torch.finfo(values.dtype).tiny, right
    size = right
    for _ in range(steps):
        left = (values @ right[..., None])[..., 0]
        left = left / left.norm(dim=-1, keepdim=True).clamp_min(tiny)
        right = (left[..., None, :] @ values)[..., 0, :]
        size = right.norm(dim=-1, keepdim=True)
        right = right / size.clamp_min(tiny)
    return left, size[..., 0], right
