"""What becomes of a quadratic loss when some weights are set to zero, and how the others make up for it.

The loss rises by 1/2 x'Ax for a change x of the weights, which is -w where weights are dropped.
"""

import torch
from torch import Tensor

from .gradient_window import GradientWindow
from .scaled_plus_low_rank import damped_root


def saliency(curvature: GradientWindow, weight: Tensor) -> Tensor:
    """Return how much the loss rises if one weight is dropped and all others make up for it, (..., d).

    This is w_a^2 / (2 [A^-1]_aa).

    References: Hassibi and Stork, "Second order derivatives for network pruning: optimal brain surgeon", 1992.

    >>> saliency(GradientWindow.of(torch.tensor([[1.0, 1.0]]), damping=1.0), torch.tensor([2.0, 0.0]))
    tensor([3., 0.])
    """
    return weight.square() / (2 * curvature.diag_inverse())


def grouped(curvature: GradientWindow, weight: Tensor, dropped: Tensor) -> Tensor:
    """Return the change (..., d) of least damage among those that drop some weights.

    It is -A^-1 E (E'A^-1 E)^-1 E'w, where E picks what is dropped. With the gradients P of what is kept and Q of
    what is dropped, the kept weights change by P'(PP' + count damping I)^-1 Q w: as many unknowns as gradients.

    Args:
        curvature: A.
        weight: w, (..., d).
        dropped: (..., d) bool.
    """
    gone = dropped.to(weight.dtype)
    kept = curvature.rows.to(weight.dtype) * (1 - gone)[..., None, :]
    root = damped_root(kept @ kept.mT, curvature.count * curvature.damping)
    missing = curvature.products(gone * weight)
    weights = torch.cholesky_solve(missing[..., None], root)
    return (kept.mT @ weights)[..., 0] - gone * weight


def independent(curvature: GradientWindow, weight: Tensor, dropped: Tensor) -> Tensor:
    """Return the sum of the changes (..., d) that make up for one dropped weight each, with exact zeros after.

    M-FAC and WoodFisher update so. Some of what makes up for a weight is then dropped with others, so that it does
    more damage than :func:`grouped` where many are dropped at once.
    """
    gone = dropped.to(weight.dtype)
    change = -curvature.solve(gone * weight / curvature.diag_inverse())
    return torch.where(dropped, -weight, change)
