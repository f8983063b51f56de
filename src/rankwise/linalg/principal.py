"""Principal components."""

import torch
from torch import Tensor

ROUNDING = 1e-5  # of a second moment: what a sum in float32 is off by at most


def principal_components(moment: Tensor, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Decompose E[x x'] - E[x] E[x]', or E[x x'] alone.

    Args:
        moment: E[x x'], (n, n), float64.
        mean: E[x], (n,), or None.

    Returns:
        the variances (n,), largest first, and the components as columns (n, n), largest entries positive. Those
        within the rounding of a second moment that was summed in float32 are zero.

    Raises:
        ValueError: if nothing varies.
    """
    covariance = moment if mean is None else moment - mean.outer(mean)
    rounding = ROUNDING * moment.diagonal()
    if not bool((covariance.diagonal() > rounding).any()):
        raise ValueError("the inputs do not vary, so they have no principal components; give other data.")
    variances, vectors = torch.linalg.eigh(covariance)
    variances, vectors = variances.flip(0), vectors.flip(1)
    variances = variances.where(variances > rounding @ vectors.square(), 0)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return variances, vectors * largest.sign()
