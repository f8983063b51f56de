"""Small non-linear modules behind the attention and feed-forward parts of blocks (Compacter)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from ..core.bottleneck import Bottleneck
from ..core.methods import BlockAdapter
from ..matrices import Hypercomplex
from ..matrices.hypercomplex import glorot


@dataclass(frozen=True, kw_only=True)
class Compacter(BlockAdapter):
    """Train h + Up(gelu(Down(h))) behind the parts of each block, Down and Up being sums of Kronecker products.

    Down (d / reduction, d) and Up are sum_i A_i x (s_i t_i) with ``count`` terms
    (:class:`~rankwise.matrices.Hypercomplex`), and biases. All layers share the A_i, and each has its own s_i and
    t_i. A module stands behind each linear layer that writes into the stream of a block, before the residual sum
    (:func:`rankwise.core.insertion.writers`). It is not linear: it cannot be folded into a weight, nor exported,
    but is saved with ``format="rankwise"`` and loaded by :func:`rankwise.load_adapter`.
    With ``also`` of :func:`rankwise.adapt` layer norms train too, as in the paper: ``lambda name: "norm" in
    name``; whether its counts of numbers hold these is unverified.

    The start is exact: the s_i of Up are zero, and the A_i have variance 1 / count, so that Down keeps the
    variance that Glorot's rule gives it. The published code makes it nearly so, by A_i of size 1e-4 in its
    settings and random s_i and t_i, whose gradients are then as small, so that it trains by Adam alone; and its
    default for c_init fails its own assertion.

    Args:
        count: k, terms, and the size of the A_i. It divides the width d and d / reduction.
        reduction: d over the width of the bottleneck; 32 as published.
        rank: of the blocks s_i t_i; 1 as published.
        last: only behind the last part of each block, the feed-forward one (Compacter++). ``where`` overrules it.

    Learning rate: 3e-3, that of its authors' settings for T5-base.

    References: Karimi Mahabadi, Henderson, Ruder, "Compacter: Efficient low-rank hypercomplex adapter layers",
        NeurIPS 2021, arXiv 2106.04647.
    """

    lr: ClassVar[float | None] = 3e-3
    count: int = 4
    reduction: int = 32
    rank: int = 1
    last: bool = False

    def __post_init__(self) -> None:
        for name in ("count", "reduction", "rank"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")

    def modules(self, outputs: Mapping[str, Tensor], generator: Generator) -> dict[str, nn.Module]:
        """Make a bottleneck for each layer; they share the A_i."""
        k, wide = self.count, torch.float32
        for like in outputs.values():
            wide = torch.promote_types(wide, like.dtype)
        mixers: dict[torch.device, nn.Parameter] = {}
        first = torch.randn(k, k, k, generator=generator) / k**0.5
        made: dict[str, nn.Module] = {}
        for name, like in outputs.items():
            d = len(like)
            w = d // self.reduction
            if d % k or w == 0 or w % k:
                raise ValueError(
                    f"layer {name}: count {k} must divide its width {d} and that of the bottleneck, {w}; change "
                    "count or reduction, or leave the layer out with 'where'."
                )
            shared = mixers.setdefault(like.device, nn.Parameter(first.to(like.device, wide)))
            parts = [
                glorot(k, *sizes, generator=generator).to(like.device, wide)
                for sizes in ((w // k, self.rank), (self.rank, d // k), (self.rank, w // k))
            ]
            zeros = parts[0].new_zeros(k, d // k, self.rank)
            made[name] = Bottleneck(
                Hypercomplex(shared, parts[0], parts[1]), Hypercomplex(shared, zeros, parts[2])
            )
        return made
