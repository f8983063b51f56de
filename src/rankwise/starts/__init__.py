"""Ways to begin training from scratch with structured matrices; one a file."""

from .companded import CompandedStart
from .sparse_plus_low_rank import SparsePlusLowRankStart
from .spectral import SpectralStart

__all__ = ["CompandedStart", "SparsePlusLowRankStart", "SpectralStart"]
