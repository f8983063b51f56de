"""The member of a set that is nearest to a matrix in a metric, for sets onto which plain projection is easy."""

import math
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from .entries import fit_entries
from .metric import Metric

RELAXATION = 1.6  # how far each step goes, as a multiple of the step of the plain method
Project = Callable[[Tensor], Tensor]


class Splitting:
    """Looks for Z in a set such that tr(S D C D') of D = W - Z is small, by splitting (ADMM).

    The set is known by its projection: which member has the least sum of squared differences from a matrix. The
    entries are first scaled by (S_ii C_jj)^1/2, so that S and C have unit diagonals and a plain difference means
    the same everywhere. Then X, near W in the metric, and Z, in the set, are drawn together by a weight that
    grows from step to step. With S = U s U' and C = V c V', the best X for given Z is a division by s_i c_j plus
    the weight, in the eigenvectors' coordinates.

    Args:
        weight: W (m, n); the work is done in its type, but at least in float32.
        outputs: S (m, m), a diagonal, or the identity.
        inputs: C (n, n), a diagonal, or the identity.

    References: Boyd et al., "Distributed optimization and statistical learning via the alternating direction
        method of multipliers", 2011 (over-relaxation: 3.4.3; sets that are not convex: 9.1). Pruning a weight so
        is ALPS, Meng et al., NeurIPS 2024, arXiv 2406.07831, with S = I.
    """

    def __init__(self, weight: Tensor, outputs: Metric, inputs: Metric) -> None:
        m, n = weight.shape
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self.rows = outputs.diagonal(m).to(weight.device).sqrt()
        self.columns = inputs.diagonal(n).to(weight.device).sqrt()
        self.outputs, self.inputs = self._unit(outputs, self.rows), self._unit(inputs, self.columns)
        self.target = self.scaled(weight)

    def _unit(self, metric: Metric, scale: Tensor) -> Tensor:
        """A metric with a unit diagonal."""
        value = metric.damped
        if value is None or value.dim() == 1:
            return torch.eye(len(scale), dtype=self.dtype, device=scale.device)
        return (value / scale[:, None] / scale).to(self.dtype)

    @cached_property
    def sides(self) -> list[tuple[Tensor, Tensor]]:
        """Eigenvalues and eigenvectors of S and of C."""
        return [tuple(torch.linalg.eigh(metric)) for metric in (self.outputs, self.inputs)]

    @cached_property
    def moment(self) -> Tensor:
        """S W C."""
        return self.image(self.target)

    def scaled(self, x: Tensor) -> Tensor:
        """Return an (m, n) matrix in the coordinates in which sets are projected onto."""
        return (self.rows[:, None] * x * self.columns).to(self.dtype)

    def plain(self, z: Tensor) -> Tensor:
        """Undo :meth:`scaled`, in float64."""
        return z.double() / self.rows[:, None] / self.columns

    def image(self, x: Tensor) -> Tensor:
        """S x C."""
        return self.outputs @ x @ self.inputs

    def error(self, z: Tensor) -> float:
        """tr(S D C D') of D = W - z."""
        change = self.target - z
        return float((self.image(change) * change).sum())

    def nearest(self, project: Project, steps: int, weights: tuple[float, float], start: Tensor) -> Tensor:
        """Return an (m, n) matrix whose projection is near to W in the metric.

        Args:
            project: the projection; everything is in scaled coordinates.
            steps: how many.
            weights: of the difference of X and Z, in the first step and in the last.
            start: what the first Z is the projection of.
        """
        (s, u), (c, v) = self.sides
        curvature = s.clamp_min(0)[:, None] * c.clamp_min(0)
        fixed = curvature * (u.mT @ self.target @ v)
        dual = torch.zeros_like(self.target)  # the multipliers, divided by the weight of the step
        z, mixed, before = project(start), start, weights[0]
        first, last = (math.log10(weight) for weight in weights)
        for weight in torch.logspace(first, last, steps).tolist():
            dual *= before / weight
            x = u @ ((fixed + weight * (u.mT @ (z - dual) @ v)) / (curvature + weight)) @ v.mT
            mixed = RELAXATION * x + (1 - RELAXATION) * z + dual
            z = project(mixed)
            dual, before = mixed - z, weight
        return mixed

    def refit(self, mask: Tensor, start: Tensor, solves: int) -> Tensor:
        """Approach the best Z that is zero outside a mask by conjugate gradients.

        Args:
            mask: (m, n) bool.
            start: (m, n) first values.
            solves: how many steps.
        """
        return fit_entries(self.moment, mask, self.outputs, self.inputs, start * mask, steps=solves)
