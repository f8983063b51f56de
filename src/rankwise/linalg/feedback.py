"""Factors Z W of a matrix Y, learned with a fixed random matrix C in the place of the transpose of W.

Gradient descent on |Y - Z W|_F^2 / 2 steps Z by R W' and W by Z' R, R = Y - Z W. Feedback alignment steps Z by
R C instead. Where it stops, R C = 0, and if W is at its optimum, the columns of Z span those of Y C. So its limit
is what the randomised range finder with the sketch C gives, without oversampling or power steps: the optimum if
the rank is that of Y or more, else a worse error than that of the truncated SVD. This reading is not the paper's;
tests hold it against numbers.

References: Garg, Vempala, "How and when random feedback works: a case study of low-rank matrix factorization",
2022, arXiv 2111.08706. Their FA* is understood here as :func:`feedback_range`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]


def gradient_factors(target: Tensor, factors: Factors, *, steps: int, rate: float = 0.1) -> Factors:
    """Descend along the gradient; see :func:`feedback_factors`, whose feedback is then the transpose of W."""
    return _descend(target, factors, lambda right: right.mT, steps, rate)


def feedback_factors(
    target: Tensor, factors: Factors, feedback: Tensor, *, steps: int, rate: float = 0.1
) -> Factors:
    """Learn Z (m, r) and W (r, n) with Z W near Y (m, n) by feedback alignment.

    It is no gradient flow, so steps are short: ``rate`` is divided by the largest curvature that is in sight.

    Args:
        target: Y.
        factors: where to begin, small, such as 1e-3 times normal numbers. They are not written into.
        feedback: C (n, r).
        steps: how many.
        rate: of 1 would be the longest stable step of gradient descent, roughly.

    >>> generator = torch.Generator().manual_seed(0)
    >>> y = torch.randn(6, 2, generator=generator) @ torch.randn(2, 5, generator=generator)
    >>> start = 1e-3 * torch.randn(6, 2, generator=generator), 1e-3 * torch.randn(2, 5, generator=generator)
    >>> z, w = feedback_factors(y, start, torch.randn(5, 2, generator=generator), steps=2000)
    >>> bool((z @ w - y).norm() < 1e-3 * y.norm())
    True
    """
    if feedback.shape != (target.shape[1], factors[0].shape[1]):
        raise ValueError(
            f"feedback must be (n, r) = {(target.shape[1], factors[0].shape[1])}, got {tuple(feedback.shape)}."
        )
    return _descend(target, factors, lambda right: feedback, steps, rate)


def feedback_range(target: Tensor, left: Tensor, feedback: Tensor, *, steps: int, rate: float = 0.1) -> Factors:
    """Learn Z as :func:`feedback_factors` does, while W is always the best one for Z (FA*).

    Then Z' R = 0, so Z only grows, and R = Y - P Y with P the projector on Z's columns.

    Args:
        target: Y (m, n).
        left: where Z (m, r) begins.
        feedback: C (n, r).
        steps: how many.
        rate: of the steps, divided by the largest singular value of Y C.
    """
    rate = rate / float(torch.linalg.matrix_norm(target @ feedback, 2))
    for _ in range(steps):
        left = left + rate * (target - left @ _best(left, target)) @ feedback
    return left, _best(left, target)


def _best(left: Tensor, target: Tensor) -> Tensor:
    """Return the W that is best for Z."""
    return torch.linalg.lstsq(left, target).solution


def _descend(
    target: Tensor, factors: Factors, back: Callable[[Tensor], Tensor], steps: int, rate: float
) -> Factors:
    left, right = factors
    size = float(torch.linalg.matrix_norm(target, 2))
    for _ in range(steps):
        rest, feedback = target - left @ right, back(right)
        curvature = max(size, float(left.square().sum()), float((right @ feedback).norm()), 1e-30)
        left, right = left + rate / curvature * rest @ feedback, right + rate / curvature * left.mT @ rest
    return left, right
