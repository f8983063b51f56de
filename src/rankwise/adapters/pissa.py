"""LoRA that starts at the weight's own leading singular vectors (PiSSA)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator

from ..core.methods import Ranked
from ..core.statistics import Stats
from ..initialisers import SingularVectors
from ..matrices import Base, StructuredMatrix
from .lora import Lora


@dataclass(frozen=True, kw_only=True)
class Pissa(Ranked):
    """:class:`Lora` with :class:`~rankwise.initialisers.SingularVectors` as its start: the leading part of W
    trains.

    The published code puts the residual W - s B A in the place of W, so that its numbers belong to a changed
    model, and in half precision the residual and the leading part no longer add up to W. Here W stays, the
    start is subtracted as a frozen term, and the change is an exact LoRA of rank 2 r: [B, -B_0] [A; A_0].

    Args:
        rank: r.
        alpha: B A counts alpha / rank; None, the published choice, means once.
        iterations: None decomposes exactly; 4 are close to it and faster for large weights, see
            :class:`~rankwise.initialisers.SingularVectors`.
        dropout: share of the branch's inputs that are dropped while training.
        ranks: from :mod:`rankwise.rank_rules`; None gives all layers the same.

    Learning rate: 5e-4, as :class:`Lora`; EVA's authors train PiSSA with it. Its own authors' scripts for
    LLaMA-2 7B say 2e-5, for LoRA too, both of rank 128; that rate is not the default here.

    References: Meng, Wang, Zhang, "PiSSA: Principal singular values and singular vectors adaptation of large
        language models", NeurIPS 2024, arXiv 2404.02948.
    """

    lr: ClassVar[float | None] = 5e-4
    rank: int = 16
    alpha: float | None = None
    iterations: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self._lora  # it checks the fields

    @property
    def _lora(self) -> Lora:
        start = SingularVectors(iterations=self.iterations)
        return Lora(rank=self.rank, alpha=self.alpha, dropout=self.dropout, start=start)

    def attach(self, base: Base, stats: Stats, generator: Generator) -> StructuredMatrix:
        """Return W + s (B A - B_0 A_0)."""
        return self._lora.attach(base, stats, generator)
