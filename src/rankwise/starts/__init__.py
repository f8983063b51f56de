"""Ways to begin training from scratch with structured matrices; one a file."""

from .sparse_plus_low_rank import SparsePlusLowRankStart

__all__ = ["SparsePlusLowRankStart"]
