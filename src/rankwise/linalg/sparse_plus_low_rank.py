"""A matrix as the sum of a sparse and a low-rank one, in a metric."""

import torch
from torch import Tensor

from .entries import between, fit_entries
from .masks import largest
from .metric import Metric, metric_svd, truncated_factors


def sparse_plus_low_rank(
    weight: Tensor,
    outputs: Metric,
    inputs: Metric,
    *,
    rank: int,
    kept: int,
    steps: int = 4,
    solves: int = 3,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find L of low rank and Z with few entries such that L + Z is near a weight W (m, n).

    The error is tr(S D C D') of D = W - L - Z. In turns, the places of Z are those where (W - L)_ij^2 is largest
    beside (S^-1)_ii (C^-1)_jj, its own effect when all others may make up for it, and its values approach the
    least-squares solution on them by conjugate gradients; L is W - Z projected on r directions, which one step of
    subspace iteration improves. The best pair met is returned.

    Args:
        weight: (m, n).
        outputs: S (m, m), a diagonal, or the identity.
        inputs: C (n, n), a diagonal, or the identity.
        rank: r.
        kept: how many entries of Z are not zero.
        steps: turns.
        solves: steps of conjugate gradients in each turn.
        first: the leading directions of W alone, (m, at least r), from :func:`metric_svd`, if they are known.

    Returns:
        the factors (m, r) and (r, n) of L, Z, dense with its zeros, and the mask of its entries; in float64.

    References: alternating projections are those of Zhou and Tao, "GoDec", ICML 2011, there without a metric;
        places are weighed as in Hassibi and Stork, "Optimal Brain Surgeon", 1993.
    """
    m, n = weight.shape
    if not 1 <= rank <= min(m, n) or not 1 <= kept <= m * n:
        raise ValueError(f"an ({m}, {n}) weight cannot have rank {rank} and {kept} entries.")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    left, right = (None if metric.damped is None else metric.damped.to(dtype) for metric in (outputs, inputs))
    size = (_inverse_diagonal(outputs, m)[:, None] * _inverse_diagonal(inputs, n)).to(weight.device)
    wide = weight.double()
    white = _white(wide, outputs, inputs)
    start = metric_svd(wide, outputs, inputs)[0] if first is None else first
    directions, sparse = start[:, :rank].double(), torch.zeros_like(wide)
    best, found = torch.inf, (directions, sparse, sparse.bool())
    for _ in range(steps):
        residual = wide - outputs.unwhiten(directions) @ (directions.mT @ outputs.whiten(wide - sparse))
        mask = largest(residual.square() / size, kept)
        moment = between(left, residual.to(dtype), right)
        sparse = fit_entries(moment, mask, left, right, (residual * mask).to(dtype), steps=solves).double()
        rest = white - _white(sparse, outputs, inputs)
        directions = torch.linalg.qr(rest @ (rest.mT @ directions))[0]
        error = float(rest.square().sum() - (directions.mT @ rest).square().sum())
        if error < best:
            best, found = error, (directions, sparse, mask)
    directions, sparse, mask = found
    return *truncated_factors(wide - sparse, outputs, directions), sparse, mask


def _white(x: Tensor, outputs: Metric, inputs: Metric) -> Tensor:
    return inputs.whiten(outputs.whiten(x).mT).mT


def _inverse_diagonal(metric: Metric, n: int) -> Tensor:
    """Return the diagonal (n,) of the inverse of a metric."""
    if metric.root is None or metric.root.dim() == 1:
        return metric.diagonal(n).reciprocal()
    return torch.cholesky_inverse(metric.root).diagonal()
