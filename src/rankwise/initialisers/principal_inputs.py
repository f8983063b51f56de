"""The start at the principal components of a layer's inputs (EVA)."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..core.components import input_components, needed
from ..core.methods import Initialiser
from ..core.statistics import Statistic, Stats
from ..matrices import StructuredMatrix


@dataclass(frozen=True, kw_only=True)
class PrincipalInputs(Initialiser):
    """B = 0, and the rows of A are the r leading principal components of the layer's inputs.

    The components are those of the exact covariance of all calibration data, where the published code updates
    an incremental decomposition until it stops turning. Layers with one input get the same rows.

    Args:
        centred: take the mean of the inputs off, as the published code does; the paper does not.
        whiten: divide each row by the standard deviation of its component, or of the first one where the data do
            not vary along its own. PEFT divides by the square root of a singular value of the data, that is by
            the root of the standard deviation, times a number that grows with how much data there is.
        answers: leave out the tokens whose own label is -100, as prompts have, where the data have ``labels`` of
            the tokens' shape. So do the published code and PEFT, though a causal model learns a label one token
            before it: of each answer the last token counts, and the one before the first does not.

    References: Paischer et al., "Parameter efficient fine-tuning via explained variance adaptation", 2024,
        arXiv 2410.07170.
    """

    centred: bool = True
    whiten: bool = False
    answers: bool = True

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        """The second moment of the inputs, and their mean where it is taken off."""
        return needed(self.centred, self.answers)

    def factors(
        self, base: StructuredMatrix, rank: int, scale: float, stats: Stats, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Decompose the covariance."""
        m, _ = base.shape
        variances, components = input_components(stats, self.needs)
        rows = components.mT[:rank]
        if self.whiten:
            rows = rows / variances.where(variances > 0, variances[0])[:rank, None].sqrt()
        return torch.zeros(m, rank, device=rows.device), rows.float()
