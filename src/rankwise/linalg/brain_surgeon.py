"""What becomes of a quadratic loss when some weights are set to zero, and how the others make up for it.

The loss rises by 1/2 x'Ax for a change x of the weights, which is -w where weights are dropped.
"""

import torch
from torch import Tensor

from .gradient_window import GradientWindow
from .scaled_plus_low_rank import damped_root

CHUNK = 1 << 23  # numbers of the matrices that are written out at once


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


def damage_of_each(curvature: GradientWindow, weight: Tensor, score: Tensor) -> Tensor:
    """Return what each weight adds to the damage if weights are dropped in order of their score, (..., d).

    The damage of :func:`grouped`, for any number of weights of least score, is the sum over them. With the
    weights of largest score first and A = LL', it is 1/2 |L_Q'w_Q|^2 for the last block L_Q of L, whose square is
    a Schur complement of A; and each entry of L_Q'w_Q is the same for any number of weights.

    Args:
        curvature: A, in blocks (b, k, d), a few of whose (d, d) matrices are written out at once.
        weight: w, (b, d).
        score: (b, d).
    """
    found = torch.empty_like(weight)
    step = max(1, CHUNK // weight.shape[-1] ** 2)
    parts = (each.split(step) for each in (curvature.rows, weight, score, found))
    for rows, w, scores, place in zip(*parts, strict=True):
        order = scores.argsort(stable=True).flip(-1)
        sorted_rows = rows.gather(-1, order[:, None].expand_as(rows)).to(weight.dtype)
        root = damped_root(sorted_rows.mT @ sorted_rows / curvature.count, curvature.damping)
        added = (root.mT @ w.gather(-1, order)[..., None])[..., 0].square() / 2
        place.scatter_(-1, order, added)
    return found


def independent(curvature: GradientWindow, weight: Tensor, dropped: Tensor) -> Tensor:
    """Return the sum of the changes (..., d) that make up for one dropped weight each, with exact zeros after.

    M-FAC and WoodFisher update so. Some of what makes up for a weight is then dropped with others, so that it
    does more damage than :func:`grouped` where many are dropped at once.
    """
    gone = dropped.to(weight.dtype)
    change = -curvature.solve(gone * weight / curvature.diag_inverse())
    return torch.where(dropped, -weight, change)
