"""Errors between known ones."""

import torch
from torch import Tensor

NOISE = 1e-6  # share of the largest error below which a small one may be rounding


def falling(errors: Tensor) -> bool:
    """Whether (k,) errors fall from each to the next, and none of them to rounding noise.

    Else they say nothing about errors in between: numbers that lie on a grid already are lost by a finer one.
    """
    return bool((errors.diff() < 0).all() and errors[-1] > NOISE * errors[0])


def log_parabola(x: Tensor, errors: Tensor, at: Tensor) -> Tensor:
    """Predict errors at (k,) places: their logarithm follows the parabola through three, which should be falling.

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


def log_linear(x: Tensor, errors: Tensor, at: Tensor) -> Tensor:
    """Predict errors at (k,) places: their logarithm follows the lines between known points.

    Args:
        x: (p,), increasing.
        errors: (p,), >= 0.
        at: (k,), from the first of x to the last.

    Returns:
        (k,) float64.
    """
    x, at = x.double(), at.double()
    logs = errors.double().clamp_min(torch.finfo(torch.float64).tiny).log()
    right = torch.searchsorted(x, at).clamp(1, len(x) - 1)
    share = (at - x[right - 1]) / (x[right] - x[right - 1])
    return torch.lerp(logs[right - 1], logs[right], share).exp()
