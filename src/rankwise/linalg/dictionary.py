"""Write the rows of a matrix as sparse combinations of the rows of another one, near it in a metric."""

from collections.abc import Callable

import torch
from torch import Tensor

from .entries import between, fit_entries
from .k_svd import k_svd
from .metric import Metric


def orthogonal_dictionary(
    weight: Tensor,
    outputs: Metric,
    inputs: Metric,
    *,
    atoms: int,
    choose: Callable[[Tensor], Tensor],
    group: int = 1,
    steps: int = 8,
    solves: int = 3,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find Z (m, k), with few entries that are not zero, and A (k, n) such that Z A is near a weight W (m, n).

    The error is tr(S D C D') of D = W - Z A. With C = L L' the atoms are orthonormal in C, A C A' = I, so that
    for given atoms only B = W C A' matters, and the error is tr(S (B - Z) (B - Z)') and a constant. In turns,

    - the places of Z are chosen by the importance S_ii B_ij^2, and its values approach the least-squares solution
      in S on these places by conjugate gradients;
    - the atoms are the polar factor of Z' S W L, which is the best choice for given codes.

    The first atoms are the leading right singular vectors in the metric; the best pair met is returned.

    Args:
        weight: (m, n); the work is done in its type, but at least in float32.
        outputs: S (m, m), a diagonal, or the identity.
        inputs: C (n, n), a diagonal, or the identity.
        atoms: k <= n.
        choose: turns the importance (m, k) into a mask of the entries to keep; see :func:`largest`.
        group: so many neighbouring atoms start far apart in the spectrum, for a ``choose`` that sets them against
            each other.
        steps: turns.
        solves: steps of conjugate gradients in each turn.

    Returns:
        Z, dense with its zeros, the mask of its entries, and A; in float64.

    References: the two closed-form steps are COMPOT's (arXiv 2602.15200), there with S = I and the same number
        of entries in every row; a dictionary for calibrated weights is CoSpaDi's, arXiv 2509.22075.
    """
    m, n = weight.shape
    if not 1 <= atoms <= n:
        raise ValueError(f"an ({m}, {n}) weight cannot have {atoms} orthogonal atoms.")
    white, metric, size = _whitened(weight, outputs, inputs)
    weighted = between(metric, white, None)  # S W L
    total = (white * weighted).sum()
    basis = torch.linalg.eigh((white.mT @ weighted).double())[1].mT.flip(0)[:atoms].to(white)
    basis = basis[torch.arange(atoms).view(group, -1).mT.flatten()]
    codes = white.new_zeros(m, atoms)
    best, found = torch.inf, (codes, codes.bool(), basis)
    for _ in range(steps):
        target = white @ basis.mT
        mask = choose(size[:, None] * target.square())
        moment = between(metric, target, None)
        codes = fit_entries(moment, mask, metric, None, target * mask, steps=solves)
        image = between(metric, codes, None)
        error = float(total + (image * (codes - 2 * target)).sum())
        if error < best:
            best, found = error, (codes, mask, basis)
        basis = _polar(image.mT @ white)
    codes, mask, basis = found
    return codes.double(), mask, inputs.unwhiten(basis.double().mT).mT


def learned_dictionary(
    weight: Tensor,
    outputs: Metric,
    inputs: Metric,
    *,
    atoms: int,
    kept: int,
    group: int | None = None,
    steps: int,
    powers: int = 1,
    picks: int = 1,
    refits: int = 3,
    solves: int = 10,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find Z (m, k) with ``kept`` entries a row and any atoms A (k, n) such that Z A is near a weight W (m, n).

    The error is tr(S D C D') of D = W - Z A. :func:`k_svd` learns from the whitened rows W L, C = L L', each as
    important as its entry in the diagonal of S. Then the places stay, and in turns Z, by conjugate gradients, and
    A, in closed form, are fitted to the whole metric.

    Args:
        weight: (m, n); the work is done in its type, but at least in float32.
        outputs: S (m, m), a diagonal, or the identity.
        inputs: C (n, n), a diagonal, or the identity.
        atoms: k.
        kept: entries of a row, or of each ``group`` neighbouring entries of a row.
        group: None for the whole row.
        steps: turns of :func:`k_svd`.
        powers: see :func:`k_svd`.
        picks: see :func:`matching_pursuit`.
        refits: turns of fitting values and atoms.
        solves: steps of conjugate gradients in each.

    Returns:
        Z, dense with its zeros, the mask of its entries, and A; in float64.

    References: CoSpaDi, arXiv 2509.22075, where S = I.
    """
    white, metric, size = _whitened(weight, outputs, inputs)
    codes, mask, basis = k_svd(
        white, atoms=atoms, kept=kept, group=group, steps=steps, powers=powers, picks=picks, weights=size
    )
    weighted = between(metric, white, None)  # S W L
    for _ in range(refits):
        moment, gram = weighted @ basis.mT, basis @ basis.mT
        codes = fit_entries(moment, mask, metric, gram, codes, steps=solves)
        basis = _least_squares(codes, between(metric, codes, None), weighted, basis)
    return codes.double(), mask, inputs.unwhiten(basis.double().mT).mT


def _whitened(weight: Tensor, outputs: Metric, inputs: Metric) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return W L, S (None for the identity) and its diagonal, in the type of the work."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    white = inputs.whiten(weight.double().mT).mT.to(dtype)
    metric = None if outputs.damped is None else outputs.damped.to(white)
    return white, metric, outputs.diagonal(len(weight)).to(white)


def _least_squares(codes: Tensor, image: Tensor, weighted: Tensor, basis: Tensor) -> Tensor:
    """Return the atoms with the least error for given codes; where these leave them open, they move least."""
    gram = (codes.mT @ image).double()
    energies, vectors = torch.linalg.eigh(gram)
    inverse = torch.where(energies > 1e-7 * energies[-1], energies.reciprocal(), 0)
    gap = (codes.mT @ weighted).double() - gram @ basis.double()
    return basis + (vectors * inverse @ (vectors.mT @ gap)).to(basis)


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
