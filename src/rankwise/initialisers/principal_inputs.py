"""The start at the principal components of a layer's inputs (EVA)."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..core.methods import Initialiser
from ..core.statistics import InputGram, InputMean, Statistic, Stats
from ..linalg import principal_components
from ..matrices import StructuredMatrix


@dataclass(frozen=True, kw_only=True)
class PrincipalInputs(Initialiser):
    """B = 0, and the rows of A are the r leading principal components of the layer's inputs.

    The components are those of the exact covariance of all calibration data, where the published code updates
    an incremental decomposition until it stops turning. Layers with one input get the same rows.

    Args:
        centred: take the mean of the inputs off, as the published code does; the paper does not.
        whiten: divide each row by the standard deviation of its component.

    References: Paischer et al., "Parameter efficient fine-tuning via explained variance adaptation", 2024,
        arXiv 2410.07170.
    """

    centred: bool = True
    whiten: bool = False

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        """The second moment of the inputs, and their mean where it is taken off."""
        return (InputGram, InputMean) if self.centred else (InputGram,)

    def factors(
        self, base: StructuredMatrix, rank: int, scale: float, stats: Stats, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Decompose the covariance."""
        m, _ = base.shape
        mean = stats[InputMean].value() if self.centred else None
        variances, components = principal_components(stats[InputGram].value(), mean)
        rows = components.mT[:rank]
        if self.whiten:
            rows = rows / variances[:rank, None].clamp_min(variances[0] * 1e-12).sqrt()
        return torch.zeros(m, rank, device=rows.device), rows.float()
