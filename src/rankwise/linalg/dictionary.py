"""Write the rows of a matrix as sparse combinations of the rows of another one."""

import torch
from torch import Tensor

from .metric import Metric


def orthogonal_dictionary(
    weight: Tensor, outputs: Metric, inputs: Metric, *, atoms: int, kept: int, steps: int = 8, solves: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    """Find Z (m, k), with few entries that are not zero, and A (k, n) such that Z A is near a weight W (m, n).

    The error is tr(S D C D') of D = W - Z A. With C = L L' the atoms are orthonormal in C, A C A' = I, so that
    for given atoms only B = W C A' matters, and the error is tr(S (B - Z) (B - Z)') and a constant. In turns,

    - the places of Z are those of the largest S_ii B_ij^2 over the whole matrix, and its values approach the
      least-squares solution in S on these places by conjugate gradients;
    - the atoms are the polar factor of Z' S W L, which is the best choice for given codes.

    The first atoms are the leading right singular vectors in the metric; the best pair met is returned.

    Args:
        weight: (m, n); the work is done in its type, but at least in float32.
        outputs: S (m, m), a diagonal, or the identity.
        inputs: C (n, n), a diagonal, or the identity.
        atoms: k <= n.
        kept: how many entries of Z are not zero.
        steps: turns.
        solves: steps of conjugate gradients in each turn.

    Returns:
        Z, dense with its zeros, the mask of its entries, and A; in float64.

    References: the two closed-form steps are COMPOT's (arXiv 2602.15200), there with S = I and the same number
        of entries in every row; a dictionary for calibrated weights is CoSpaDi's, arXiv 2509.22075.
    """
    m, n = weight.shape
    if not 1 <= atoms <= n or not 1 <= kept <= m * atoms:
        raise ValueError(f"an ({m}, {n}) weight cannot have {atoms} atoms and {kept} entries.")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    white = inputs.whiten(weight.double().mT).mT.to(dtype)  # W L
    metric = None if outputs.damped is None else outputs.damped.to(white)
    weighted = _apply(metric, white)  # S W L
    total = (white * weighted).sum()
    size = outputs.diagonal(m).to(white)[:, None]
    basis = torch.linalg.eigh((white.mT @ weighted).double())[1].mT.flip(0)[:atoms].to(dtype)
    codes = white.new_zeros(m, atoms)
    best, found = torch.inf, (codes, codes.bool(), basis)
    for _ in range(steps):
        target = white @ basis.mT
        places = (size * target.square()).flatten().topk(kept).indices
        mask = torch.zeros_like(target).flatten().index_fill(0, places, 1).view_as(target)
        codes = _fit(metric, size, target, mask, solves)
        image = _apply(metric, codes)
        error = float(total + (image * (codes - 2 * target)).sum())
        if error < best:
            best, found = error, (codes, mask.bool(), basis)
        basis = _polar(image.mT @ white)
    codes, mask, basis = found
    return codes.double(), mask, inputs.unwhiten(basis.double().mT).mT


def _apply(metric: Tensor | None, x: Tensor) -> Tensor:
    if metric is None:
        return x
    return metric[:, None] * x if metric.dim() == 1 else metric @ x


def _fit(metric: Tensor | None, size: Tensor, target: Tensor, mask: Tensor, solves: int) -> Tensor:
    """Approach the least tr(S (B - Z) (B - Z)') over the entries of Z in the mask by conjugate gradients."""
    codes = target * mask
    residual = mask * _apply(metric, target - codes)
    step = residual / size
    power = (residual * step).sum()
    for _ in range(solves):
        if not power > 0:
            break
        image = mask * _apply(metric, step)
        length = power / (step * image).sum()
        codes, residual = codes + length * step, residual - length * image
        scaled = residual / size
        power, before = (residual * scaled).sum(), power
        step = scaled + power / before * step
    return codes


def _polar(matrix: Tensor) -> Tensor:
    """Return the (k, n) matrix with orthonormal rows that is nearest to a (k, n) one."""
    wide = matrix.double()
    energies, vectors = torch.linalg.eigh(wide @ wide.mT)
    if bool(energies[0] > 1e-10 * energies[-1]):
        factor = vectors * energies.rsqrt() @ vectors.mT @ wide
    else:
        u, _, v = torch.linalg.svd(wide, full_matrices=False)
        factor = u @ v
    return factor.to(matrix.dtype)
