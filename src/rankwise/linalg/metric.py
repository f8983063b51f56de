"""Positive semi-definite metrics on one side of a matrix, and the SVD measured in two of them."""

import torch
from torch import Tensor

ROUNDING = 1e-4  # of a float32 sum's largest eigenvalue; what is more negative is no second moment


class Metric:
    """A metric M = R R' with R lower triangular: the identity, a diagonal, or a full matrix.

    Args:
        value: None for the identity, (n,) for a diagonal, (n, n) for a full matrix.
        damping: multiple of the mean of the diagonal that is added to the diagonal.

    A second moment of fewer rows than columns, summed in float32, has eigenvalues that are zero but for rounding.
    Where these are so negative that the damping does not lift them, they count as zero before it is added.

    Raises:
        ValueError: if the metric is zero or, after damping, not positive definite.
    """

    def __init__(self, value: Tensor | None = None, damping: float = 0.0) -> None:
        self.value = self.root = None
        if value is None:
            return
        value = value.double()
        diagonal = value if value.dim() == 1 else value.diagonal()
        lift = damping * diagonal.mean()
        if value.dim() == 1:
            self.value = value + lift
            self.root = self.value.sqrt()
            broken = not bool((self.value > 0).all())
        else:
            self.value = value + lift * torch.eye(len(value), dtype=value.dtype, device=value.device)
            self.root, info = torch.linalg.cholesky_ex(self.value)
            broken = bool(info > 0)
            if broken and lift > 0 and bool(value.isfinite().all()):
                self.root = _root_without_rounding(value, lift)
                self.value = self.root @ self.root.mT
                broken = not bool((self.root.diagonal() > 0).all())
        if broken or not bool(self.value.isfinite().all()):
            raise ValueError(f"the statistics are zero or singular, and damping {damping:g} does not repair that.")

    def _scale(self, x: Tensor, factor: Tensor | None) -> Tensor:
        if factor is None:
            return x
        return factor[:, None] * x if factor.dim() == 1 else factor @ x

    def apply(self, x: Tensor) -> Tensor:
        """Return M x for x of (n, k)."""
        return self._scale(x, self.value)

    def whiten(self, x: Tensor) -> Tensor:
        """Return R' x, whose squared Frobenius norm is tr(x' M x)."""
        return self._scale(x, None if self.root is None else self.root.mT if self.root.dim() == 2 else self.root)

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

    Returns:
        U (m, k) and s (k,) with k = min(m, n), float64.
    """
    core = inputs.whiten(outputs.whiten(weight.double()).mT).mT  # T W L
    u, s, _ = torch.linalg.svd(core, full_matrices=False)
    return u, s


def truncated_factors(weight: Tensor, outputs: Metric, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors (m, r) and (r, n) of the projection of a weight on the directions ``u`` (m, r)."""
    u = u.double()
    return outputs.unwhiten(u), u.mT @ outputs.whiten(weight.double())


def metric_norm(change: Tensor, outputs: Metric, inputs: Metric) -> float:
    """Return tr(S D C D') of an (m, n) change D, in float64."""
    change = change.double()
    return float((outputs.apply(change) * inputs.apply(change.mT).mT).sum())
