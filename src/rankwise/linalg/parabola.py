"""Errors between three known ones."""

import torch
from torch import Tensor


def log_parabola(x: Tensor, errors: Tensor, at: Tensor) -> Tensor:
    """Predict errors at (k,) places: their logarithm follows the parabola through three points.

    Args:
        x: (3,).
        errors: (3,), >= 0.
        at: (k,).

    Returns:
        (k,) float64.
    """
    logs = errors.double().clamp_min(torch.finfo(torch.float64).tiny).log()
    solved = torch.linalg.solve(torch.vander(x.double(), 3), logs)
    return (torch.vander(at.double(), 3) @ solved).exp()
