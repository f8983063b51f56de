"""Measures that need only the singular values of a weight, which are then computed once for all of them."""

import abc

import torch
from torch import Tensor

from ..core.methods import Measure
from ..core.statistics import Stats


class SpectralMeasure(Measure):
    """A measure of the singular values and the shape of a weight."""

    @abc.abstractmethod
    def of_spectrum(self, values: Tensor, shape: tuple[int, int]) -> dict[str, float | None]:
        """Measure an (m, n) weight by its min(m, n) singular values, float64, largest first."""

    def __call__(self, weight: Tensor, stats: Stats) -> dict[str, float | None]:
        """Measure an (m, n) weight."""
        m, n = weight.shape
        return self.of_spectrum(singular_values(weight), (m, n))


def singular_values(weight: Tensor) -> Tensor:
    """Return the singular values of an (m, n) weight, float64, largest first.

    What rounding a product to the weight's own type adds is no spectrum: values below eps |W| (1 / sqrt(m) +
    1 / sqrt(n)), some three times the norm of independent roundings of as large entries, are zero. Numbers in
    half precision are taken as they are, with the eps of float32.

    Raises:
        ValueError: if the weight is not a matrix of finite numbers.

    >>> singular_values(torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0]]))
    tensor([2., 1.], dtype=torch.float64)
    """
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight must be an (m, n) matrix, got shape {tuple(weight.shape)}.")
    if not bool(weight.isfinite().all()):
        raise ValueError("weight must be finite, got NaN or infinity; the file may be damaged.")
    values = torch.linalg.svdvals(weight.detach().double())
    eps = torch.finfo(torch.promote_types(weight.dtype, torch.float32)).eps
    rounding = eps * values.norm() * sum(side**-0.5 for side in weight.shape)
    return values.where(values > rounding, 0)


def nonzero(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Keep the singular values that are not rounding errors: above max(m, n) * epsilon * the largest."""
    return values[values > max(shape) * torch.finfo(values.dtype).eps * values[0]]
