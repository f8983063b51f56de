"""The usual random start of a low-rank update."""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..core.methods import Initialiser
from ..core.statistics import Stats
from ..matrices import StructuredMatrix


@dataclass(frozen=True, kw_only=True)
class Uniform(Initialiser):
    """B = 0, and A uniform in +-1/sqrt(n), which is Kaiming's rule with a = sqrt(5).

    At the start the gradient of A is zero, and that of B is not.

    References: Hu et al., "LoRA", ICLR 2022, arXiv 2106.09685.
    """

    def factors(
        self, base: StructuredMatrix, rank: int, scale: float, stats: Stats, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw (m, r) zeros and (r, n) random numbers."""
        m, n = base.shape
        right = (2 * torch.rand(rank, n, generator=generator) - 1) / math.sqrt(n)
        return torch.zeros(m, rank, device=base.device), right.to(base.device)
