"""The largest eigenvalues of symmetric maps that are known by their products alone."""

from collections.abc import Callable

import torch
from torch import Tensor

EMPTY = 1e-10  # a new direction shorter than this, beside the largest eigenvalue, is rounding


def lanczos(
    apply: Callable[[Tensor], Tensor], start: Tensor, *, count: int, steps: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues of k symmetric maps at once, by Lanczos' method.

    All earlier vectors are kept, steps times the size of one, and new ones are made orthogonal to them twice.
    Where a start is used up, a new one is drawn. Of several equal eigenvalues fewer may be found.

    Args:
        apply: (k, n) -> (k, n), a symmetric map for each row, with no eigenvalue below zero.
        start: (k, n), random: what it lacks is not found. It sets type and device.
        count: how many eigenvalues, up to n.
        steps: products at most, at least ``count``.
        tolerance: it ends where all residuals are below this share of the largest eigenvalue.

    Returns:
        eigenvalues (k, count), largest first, and norms of residuals (k, count): an eigenvalue is this near, and
        as a rule far nearer, as the error falls as the residual's square. Both float64 on the CPU.

    Raises:
        FloatingPointError: if a product is not finite.

    >>> values = torch.tensor([[3.0, 1.0, 0.0, 2.0]])
    >>> found, _ = lanczos(lambda x: values * x, torch.ones(1, 4), count=2, steps=4, tolerance=0.0)
    >>> found.round(decimals=4)
    tensor([[3., 2.]], dtype=torch.float64)
    """
    k, n = start.shape
    steps = min(steps, n)
    generator = torch.Generator().manual_seed(0)
    basis = start.new_empty(k, steps, n)
    form = torch.zeros(k, steps, steps, dtype=torch.float64)
    new = start / start.norm(dim=-1, keepdim=True)
    values = residuals = torch.empty(0)
    for j in range(steps):
        basis[:, j] = new
        image = apply(new)
        if not bool(image.isfinite().all()):
            raise FloatingPointError("a product is not finite; look at the weights and the data.")
        form[:, j, j] = (image * new).sum(-1).double().cpu()
        rest = _without(image, basis[:, : j + 1])
        length = rest.norm(dim=-1)
        values, vectors = torch.linalg.eigh(form[:, : j + 1, : j + 1])
        values, largest = values.flip(-1), values[:, -1:].abs()
        lengths = length.double().cpu()[:, None]
        used_up = lengths <= EMPTY * largest
        residuals = torch.where(used_up, 0.0, lengths * vectors[:, -1].abs().flip(-1))
        if j + 1 == steps or (j + 1 >= count and bool((residuals[:, :count] <= tolerance * largest).all())):
            break
        if bool(used_up.any()):
            drawn = torch.randn(k, n, generator=generator).to(start)
            fresh = _without(drawn, basis[:, : j + 1])
            rest = torch.where(used_up.to(rest.device), fresh, rest)
            lengths = torch.where(used_up, 0.0, lengths)
        form[:, j, j + 1] = form[:, j + 1, j] = lengths[:, 0]
        new = rest / rest.norm(dim=-1, keepdim=True)
    return values[:, :count], residuals[:, :count]


def _without(vectors: Tensor, basis: Tensor) -> Tensor:
    """Vectors (k, n) without their parts in the span of orthonormal rows (k, j, n)."""
    for _ in range(2):
        vectors = vectors - ((basis @ vectors[..., None]).mT @ basis)[:, 0]
    return vectors
