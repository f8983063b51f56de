"""The random start of a low-rank update of an embedding."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..core.methods import Initialiser
from ..core.statistics import Stats
from ..matrices import StructuredMatrix


@dataclass(frozen=True, kw_only=True)
class NormalOutputs(Initialiser):
    """A = 0, and B standard normal: the start for embeddings.

    Of the inputs of an embedding a single one is not zero, so that a start of A that counts on all of them, as
    :class:`Uniform` does, leaves B next to no gradient. The columns of A are then zero until their token is seen.

    References: the roles are those of the code of Hu et al., "LoRA", ICLR 2022, arXiv 2106.09685, and of PEFT.
    """

    def factors(
        self, base: StructuredMatrix, rank: int, scale: float, stats: Stats, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw (m, r) random numbers and (r, n) zeros."""
        m, n = base.shape
        left = torch.randn(m, rank, generator=generator)
        return left.to(base.device), torch.zeros(rank, n, device=base.device)
