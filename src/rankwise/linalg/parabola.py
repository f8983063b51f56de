"""Values between three known ones."""

import torch
from torch import Tensor


def parabola(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """Return what the parabola through three points has at (k,) other places, float64.

    Args:
        x: (3,).
        y: (3,).
        at: (k,).
    """
    powers = torch.vander(x.double(), 3)
    return torch.vander(at.double(), 3) @ torch.linalg.solve(powers, y.double())
