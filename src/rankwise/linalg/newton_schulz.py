"""Polar factors by products of matrices alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

Polynomial = tuple[float, float, float]
Factor = float | Tensor
MARGIN = 1.01  # what rounding to bfloat16 may lift singular values by

MUON: Polynomial = (3.4445, -4.7750, 2.0315)
"""Fast, but does not converge: after five steps values from 0.01 to 1 are in (0.68, 1.14)."""

POLAR_EXPRESS: tuple[Polynomial, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
"""Six steps bring values from 0.001 to 1 within 0.0012 of one (Amsel et al., Polar Express, arXiv 2505.16932)."""


def newton_schulz(
    values: Tensor, polynomials: Sequence[Polynomial], floor: float = 1e-7, dtype: torch.dtype | None = None
) -> Tensor:
    """Return nearly the polar factors U V' of matrices (..., m, n) = U S V'.

    Each polynomial (a, b, c) takes the singular values s, first divided by their norm, to a s + b s^3 + c s^5;
    singular vectors never change, and zeros stay.

    Args:
        values: (..., m, n), float32 or longer; bfloat16 where such precision is enough.
        polynomials: one a step, in order.
        floor: what is added to the norm.
        dtype: that products are computed in, if not that of ``values``: bfloat16, or a longer one. Polynomials
            that would make infinity of what rounding lifts above one, as those that converge fast, then take
            singular values to be smaller by that.

    >>> import torch
    >>> newton_schulz(torch.diag(torch.tensor([3.0, -1.0])), POLAR_EXPRESS).round(decimals=4)
    tensor([[ 1.,  0.],
            [ 0., -1.]])
    """
    inside = values / (torch.linalg.matrix_norm(values, keepdim=True) + floor)
    if dtype is None:
        return odd_polynomials(inside, polynomials)
    return odd_polynomials(inside.to(dtype), _safe(polynomials)).to(values.dtype)


def odd_polynomials(values: Tensor, polynomials: Sequence[tuple[Factor, Factor, Factor]]) -> Tensor:
    """Return U f(S) V' of matrices (..., m, n) = U S V', where f is a s + b s^3 + c s^5 again and again.

    Args:
        values: (..., m, n).
        polynomials: (a, b, c), in order; numbers, or tensors that fit (..., 1, 1).

    >>> odd_polynomials(torch.diag(torch.tensor([2.0, -1.0])), [(1.0, 0.5, 0.0)])
    tensor([[ 6.0000,  0.0000],
            [ 0.0000, -1.5000]])
    """
    tall = values.shape[-2] > values.shape[-1]
    x = values.mT if tall else values
    for a, b, c in polynomials:
        gram = x @ x.mT
        even = b * gram if isinstance(c, float) and not c else b * gram + c * (gram @ gram)
        x = a * x + even @ x
    return x.mT if tall else x


def odd_range(polynomials: Sequence[Polynomial], largest: float) -> tuple[float, float]:
    """Return the least and the largest value that polynomials, one after the other, take on [0, largest].

    It is exact but for rounding: a polynomial takes an interval to an interval, whose ends are values at the ends
    or where the slope is zero.

    >>> odd_range([(1.5, -0.5, 0.0)], 1.5)
    (0.0, 1.0)
    """
    low, high = 0.0, largest
    for a, b, c in polynomials:
        ends = [low, high, *(s for s in _flat(a, b, c) if low < s < high)]
        values = [s * (a + s * s * (b + s * s * c)) for s in ends]
        low, high = min(values), max(values)
    return low, high


def _flat(a: float, b: float, c: float) -> list[float]:
    """Where a + 3 b s^2 + 5 c s^4 is zero."""
    if c:
        inside = 9 * b * b - 20 * a * c
        squares = [(-3 * b + sign * inside**0.5) / (10 * c) for sign in (-1, 1)] if inside >= 0 else []
    else:
        squares = [-a / (3 * b)] if b else []
    roots = [square**0.5 for square in squares if square >= 0]
    return [sign * root for root in roots for sign in (-1, 1)]


def _safe(polynomials: Sequence[Polynomial]) -> Sequence[Polynomial]:
    """Return polynomials that keep values bounded which are lifted by MARGIN before each: the same if they do."""
    high = MARGIN
    for polynomial in polynomials:
        high = MARGIN * odd_range([polynomial], high)[1]
    if high < 2:
        return polynomials
    return [(a / MARGIN, b / MARGIN**3, c / MARGIN**5) for a, b, c in polynomials]
