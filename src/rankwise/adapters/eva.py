"""LoRA that starts at, and is spread by, the principal components of the inputs (EVA)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator

from ..core.methods import Adapter
from ..core.statistics import Statistic, Stats
from ..initialisers import PrincipalInputs
from ..matrices import Base, StructuredMatrix
from ..rank_rules import ExplainedVariance
from .lora import Lora


@dataclass(frozen=True, kw_only=True)
class Eva(Adapter):
    """:class:`Lora` with :class:`~rankwise.initialisers.PrincipalInputs` as its start.

    Ranks are spread by :class:`~rankwise.rank_rules.ExplainedVariance`; their sum is less than ``rank`` times the
    number of layers where the inputs have fewer directions. It reads calibration data, best that of the task.

    Args:
        rank: average rank of the layers.
        alpha: B A counts alpha / rank in all layers; None means once.
        most: the largest rank of a layer, as a multiple of the average.
        centred: take the mean of the inputs off.
        whiten: divide the rows of A by their components' standard deviations.
        answers: leave out tokens without a label, such as those of prompts; see the start.
        dropout: share of the branch's inputs that are dropped while training.

    Learning rate: 5e-4, that of its authors' scripts for models of 7B.

    References: Paischer et al., "Parameter efficient fine-tuning via explained variance adaptation", 2024,
        arXiv 2410.07170.
    """

    lr: ClassVar[float | None] = 5e-4
    rank: int = 16
    alpha: float | None = None
    most: float = 2.0
    centred: bool = True
    whiten: bool = False
    answers: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _ = self._lora, self.ranks  # they check the fields

    @property
    def _lora(self) -> Lora:
        start = PrincipalInputs(centred=self.centred, whiten=self.whiten, answers=self.answers)
        return Lora(rank=self.rank, alpha=self.alpha, dropout=self.dropout, start=start)

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        """What the start reads."""
        return self._lora.needs

    @property
    def ranks(self) -> ExplainedVariance:
        """By explained variance."""
        return ExplainedVariance(most=self.most, centred=self.centred, answers=self.answers)

    def with_rank(self, rank: int) -> Lora:
        """The same start with another rank."""
        return self._lora.with_rank(rank)

    def attach(self, base: Base, stats: Stats, generator: Generator) -> StructuredMatrix:
        """Return W + s B A."""
        return self._lora.attach(base, stats, generator)
