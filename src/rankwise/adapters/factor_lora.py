"""LoRA on the factors of a compressed weight, which merges into them without growth."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from ..core.methods import Adapter
from ..core.statistics import Stats
from ..initialisers import Uniform
from ..matrices import (
    Base,
    Branch,
    ChangedFactors,
    Dense,
    LowRank,
    PivotedLowRank,
    StructuredMatrix,
)
from .lora import Lora

FACTORED = (Dense, LowRank, PivotedLowRank)


@dataclass(frozen=True, kw_only=True)
class FactorLora(Adapter):
    """Train (U + s B_1 A_1) (V + s B_2 A_2) for a weight W = U V that is kept in factors, with U and V frozen.

    The result has the rank of W whatever is trained, so that :func:`rankwise.absorb` puts it into U and V
    exactly, with as many numbers as before; of :class:`Lora` beside W that cuts a part away. To first order the
    change is B_1 A_1 V + U B_2 A_2, which is tangent to the matrices of W's rank. In a pivoted matrix the kept
    lines and the combinations of the others are the factors, in a sum or a product those of its low-rank and
    dense parts. On an ordinary weight it is :class:`Lora`.

    Args:
        rank: of each change; of a factor with a shorter side that is less, it is that.
        alpha: s = alpha / rank; None means s = 1.

    Learning rate: none is published; the general one holds.

    References: for the tangent space, Vandereycken, "Low-rank matrix completion by Riemannian optimization",
        2013, arXiv 1209.3834. We know of no paper that trains LoRA on factors.

    >>> import torch
    >>> from rankwise.matrices import Base, LowRank
    >>> adapted = FactorLora(rank=1).attach(Base(LowRank(torch.ones(6, 2), torch.ones(2, 5))), {}, Generator())
    >>> sum(p.numel() for p in adapted.parameters() if p.requires_grad), adapted.rank
    (15, 2)
    """

    rank: int = 8
    alpha: float | None = None

    def __post_init__(self) -> None:
        _ = self._lora  # it checks the fields

    @property
    def _lora(self) -> Lora:
        return Lora(rank=self.rank, alpha=self.alpha)

    def attach(self, base: Base, stats: Stats, generator: Generator) -> StructuredMatrix:
        """Return W with a change of each factor."""
        if isinstance(base.matrix, Dense):
            return self._lora.attach(base, stats, generator)
        factors = factors_of(base.matrix)
        if not factors:
            raise ValueError(
                f"a {type(base.matrix).__name__} has no factors; use Lora, or train what is stored with heal."
            )
        return ChangedFactors(base, {name: self._change(factor, generator) for name, factor in factors.items()})

    def _change(self, factor: Tensor, generator: Generator) -> Branch:
        rank, kind = min(self.rank, *factor.shape), torch.promote_types(factor.dtype, torch.float32)
        left, right = Uniform().factors(Dense(factor), rank, self._lora.scale, {}, generator)
        return Branch(LowRank(left.to(kind), right.to(kind)), self._lora.scale)


def factors_of(matrix: nn.Module) -> dict[str, Tensor]:
    """Return the factors of a structure that a low-rank change may be added to, by their names in it."""
    return {
        f"{path}.{name}".lstrip("."): parameter.detach()
        for path, part in matrix.named_modules()
        if isinstance(part, FACTORED)
        for name, parameter in part.named_parameters(recurse=False)
        if parameter.numel()
    }
