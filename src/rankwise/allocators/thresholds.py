"""Allocations by one threshold for all layers, as published methods choose their ranks."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..core.choices import Ladder, check_budget, cost_of

Pick = Callable[[Ladder, float], int]
ROUNDING = 1e-12  # of the total error: two ways to sum the same squares differ by less


def spectrum_threshold(ladders: Mapping[str, Ladder], budget: int) -> dict[str, int]:
    """Keep in every layer the singular values above one threshold, each spectrum scaled to [0, 1] (WeLore).

    A layer whose rank would cost as much as the dense layer stays dense. The paper states its budget in ranks;
    here it is the project's own. One outlying singular value makes a layer look low-rank. Where all are equal,
    which have no scale, they count as falling evenly, as those do that differ a little.

    Raises:
        ValueError: if a method has no singular values.

    References: Jaiswal et al., "From GaLore to WeLore", ICML 2025, arXiv 2407.11239.
    """

    def pick(ladder: Ladder, threshold: float) -> int:
        if ladder.spectrum is None:
            raise ValueError("spectrum_threshold needs a method with singular values; use another allocator.")
        s = ladder.spectrum
        rank = max(int((_scaled(s) >= threshold).sum()), 1)
        left_out = float(s[rank:].square().sum()) + ROUNDING * ladder.total
        return int((ladder.errors > left_out).sum())  # the smallest choice of at least this rank

    return _by_threshold(ladders, budget, pick)


def _scaled(s: Tensor) -> Tensor:
    """Move a spectrum, largest first, to [0, 1]."""
    spread = s[0] - s[-1]
    if float(spread) <= len(s) * torch.finfo(s.dtype).eps * float(s[0]):
        return torch.linspace(1, 0, len(s)).to(s)
    return (s - s[-1]) / spread


def relative_error(ladders: Mapping[str, Ladder], budget: int) -> dict[str, int]:
    """Give every layer the smallest choice whose share of lost energy is below one threshold.

    This is how a principal-component analysis of layer outputs is cut (LoRD, from atomic feature mimicking).
    LoRD's paper sweeps one rank for each type of layer instead, by perplexity, and does not publish the ranks.

    References: Kaushal, Vaidhya, Rish, "LORD: Low rank decomposition of monolingual code LLMs for one-shot
        compression", 2023, arXiv 2309.14021.
    """

    def pick(ladder: Ladder, threshold: float) -> int:
        return int((ladder.errors > threshold * ladder.total).sum())

    return _by_threshold(ladders, budget, pick)


def _by_threshold(ladders: Mapping[str, Ladder], budget: int, pick: Pick) -> dict[str, int]:
    """Bisect the smallest threshold in [0, 1] whose picks fit the budget."""
    check_budget(ladders, budget)

    def at(threshold: float) -> dict[str, int]:
        return {name: pick(ladder, threshold) for name, ladder in ladders.items()}

    low, high = 0.0, 1.0
    if cost_of(ladders, at(low)) <= budget:
        return at(low)
    if cost_of(ladders, at(high)) > budget:
        raise ValueError(
            f"the budget {budget} cannot be met by a threshold; use another allocator, or keep more."
        )
    for _ in range(60):
        middle = (low + high) / 2
        if cost_of(ladders, at(middle)) > budget:
            low = middle
        else:
            high = middle
    return at(high)
