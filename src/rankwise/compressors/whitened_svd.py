"""Truncated SVD measured on the layer's inputs instead of on its weights (SVD-LLM)."""

from dataclasses import dataclass
from typing import ClassVar

from ..core.statistics import InputGram, Statistic, Stats
from ..linalg import Metric
from .quadratic import check_damping
from .truncation import TruncatedSvd


@dataclass(frozen=True, kw_only=True)
class WhitenedSvd(TruncatedSvd):
    """Keep the r directions of W that matter most for E|W x - W_r x|^2.

    With C = E[x x'] = L L' the error is |(W - W_r) L|_F^2, and the best W_r is the projection of W on the
    first r left singular vectors of W L; L is never inverted.

    Args:
        damping: multiple of mean(diag C) added to C's diagonal, so that few tokens or unused inputs do no harm.
        gauge: how the result is stored: r rows or columns and how they make the others, or two factors.
        rank_multiple: offer only multiples of it, such as 16 or 32, for processors that prefer them.

    References: Wang et al., "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model
        Compression", ICLR 2025, arXiv 2403.07378 (the whitening step). Errors of different layers are not
        comparable: an allocator that compares them does worse than uniform.
    """

    damping: float = 1e-6
    needs: ClassVar[tuple[type[Statistic], ...]] = (InputGram,)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damping("damping", self.damping)

    def metrics(self, stats: Stats) -> tuple[Metric, Metric]:
        """C alone: the error is E|W x - W_r x|^2."""
        return Metric(), Metric(stats[InputGram].value(), self.damping)
