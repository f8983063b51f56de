"""Ways to begin training from scratch with structured matrices; one a file."""

from .sparse_plus_low_rank import SparsePlusLowRankStart
from .spectral import SpectralStart

__all__ = ["SparsePlusLowRankStart", "SpectralStart"]
