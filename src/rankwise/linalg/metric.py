"""Positive semi-definite metrics on one side of a matrix, and the SVD measured in two of them."""

from functools import cached_property

import torch
from torch import Tensor

from .symmetric_eigen import symmetric_eigen
from .triangles import transposed_product

ROUNDING = 1e-4  # of a float32 sum's largest eigenvalue; what is more negative is no second moment


class Metric:
    """A metric M = R R' with R lower triangular: the identity, a diagonal, or a full matrix.

    Args:
        value: None for the identity, (n,) for a diagonal, (n, n) for a full matrix.
        damping: multiple of the mean of the diagonal that is added to the diagonal.

    A second moment of fewer rows than columns, summed in float32, has eigenvalues that are zero but for rounding.
    Where these are so negative that the damping does not lift them, they count as zero before it is added.

    Raises:
        ValueError: when the root is first needed, if the metric is zero or, after damping, not positive definite.
    """

    def __init__(self, value: Tensor | None = None, damping: float = 0.0) -> None:
        self.value, self.damping = value, damping

    @cached_property
    def root(self) -> Tensor | None:
        """R in float64, (n,) or (n, n), or None for the identity."""
        if self.value is None:
            return None
        value = self.value.double()
        if value.dim() == 1:
            root = (value + self.damping * value.mean()).sqrt()
            broken = not bool((root > 0).all())
        else:
            lift = self.damping * value.diagonal().mean()
            root, info = torch.linalg.cholesky_ex(value + lift * torch.eye(len(value)).to(value))
            if info > 0 and lift > 0 and bool(value.isfinite().all()):
                root = _root_without_rounding(value, lift)
            broken = not bool((root.diagonal() > 0).all()) or (bool(info > 0) and not lift > 0)
        if broken or not bool(root.isfinite().all()):
            raise ValueError(
                f"the statistics are zero or singular, and damping {self.damping:g} does not repair that."
            )
        return root

    def whiten(self, x: Tensor) -> Tensor:
        """Return R' x for x of (n, k), whose squared Frobenius norm is tr(x' M x)."""
        if self.root is None:
            return x
        return self.root[:, None] * x if self.root.dim() == 1 else transposed_product(self.root, x)

    @cached_property
    def damped(self) -> Tensor | None:
        """M = R R' in float64, (n,) or (n, n), or None for the identity."""
        if self.root is None:
            return None
        return self.root.square() if self.root.dim() == 1 else self.root @ self.root.mT

    def diagonal(self, n: int) -> Tensor:
        """Return the diagonal of M, (n,)."""
        if self.damped is None:
            return torch.ones(n, dtype=torch.float64)
        return self.damped if self.damped.dim() == 1 else self.damped.diagonal()

    def dual(self, x: Tensor) -> Tensor:
        """Return R^-1 x, which whitens gradients as :meth:`whiten` does changes: <x, y> = <R^-1 x, R' y>."""
        if self.root is None:
            return x
        if self.root.dim() == 1:
            return x / self.root[:, None]
        return torch.linalg.solve_triangular(self.root, x, upper=False)

    def unwhiten(self, x: Tensor) -> Tensor:
        """Return R'^-1 x."""
        if self.root is None:
            return x
        if self.root.dim() == 1:
            return x / self.root[:, None]
        return torch.linalg.solve_triangular(self.root.mT, x, upper=True)


def _root_without_rounding(value: Tensor, lift: Tensor) -> Tensor:
    """Return the lower triangular root of value + lift * I, negative eigenvalues of value being rounding."""
    energies, vectors = torch.linalg.eigh(value)
    if float(energies[0]) < -ROUNDING * float(energies[-1]):
        return torch.zeros_like(value)
    root = vectors * (energies.clamp_min(0) + lift).sqrt()
    upper = torch.linalg.qr(root.mT, mode="r")[1]
    return upper.mT * upper.diagonal().sign()


def metric_svd(weight: Tensor, outputs: Metric, inputs: Metric) -> tuple[Tensor, Tensor]:
    """Decompose an (m, n) weight in the metric tr(S D C D') of a change D.

    With S = T' T and C = L L', this is the SVD of T W L = U s V'. The best rank-r matrix in the metric is
    ``T^-1 U_r U_r' T W`` (see :func:`truncated_factors`), which needs no inverse of L, and its error is the
    sum of the squares of the singular values left out.

    V is not needed, so that eigenvectors of a matrix (k, k) do, in a fraction of the time. The squares of s are
    exact to the rounding of the largest one, 1e-15 of it.

    Returns:
        U (m, k) and s (k,) with k = min(m, n), float64.
    """
    core = inputs.whiten(outputs.whiten(weight.double()).mT).mT  # T W L
    tall = core.shape[0] > core.shape[1]
    basis, core = torch.linalg.qr(core) if tall else (None, core)
    squares, u = symmetric_eigen(core @ core.mT)
    u = u if basis is None else basis @ u
    return u.flip(1), squares.flip(0).sqrt()


def truncated_factors(weight: Tensor, outputs: Metric, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors (m, r) and (r, n) of the projection of a weight on the directions ``u`` (m, r)."""
    u = u.double()
    return outputs.unwhiten(u), u.mT @ outputs.whiten(weight.double())


def metric_norm(change: Tensor, outputs: Metric, inputs: Metric) -> float:
    """Return tr(S D C D') of an (m, n) change D, in float64."""
    return float(inputs.whiten(outputs.whiten(change.double()).mT).square().sum())
