"""Principal components."""

import torch
from torch import Tensor


def principal_components(moment: Tensor, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Decompose E[x x'] - E[x] E[x]', or E[x x'] alone.

    Args:
        moment: E[x x'], (n, n), float64.
        mean: E[x], (n,), or None.

    Returns:
        the variances (n,), largest first, and the components as columns (n, n), largest entries positive.

    Raises:
        ValueError: if nothing varies.
    """
    covariance = moment if mean is None else moment - mean.outer(mean)
    variances, vectors = torch.linalg.eigh(covariance)
    variances, vectors = variances.flip(0).clamp_min(0), vectors.flip(1)
    if not float(variances[0]) > 0:
        raise ValueError("the inputs do not vary, so they have no principal components.")
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return variances, vectors * largest.sign()
