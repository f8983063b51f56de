"""A weight-normalised low-rank update (GradNormLoRP)."""

from dataclasses import dataclass, field

from torch import Generator

from ..core.methods import Initialiser, Ranked
from ..core.statistics import Statistic, Stats
from ..initialisers import Uniform
from ..matrices import Base, RowNormalised, StructuredMatrix
from .lora import Lora


@dataclass(frozen=True, kw_only=True)
class GradNormLorp(Ranked):
    """Train B (m, r), A (r, n) and the lengths c (m,) in W'_i = c_i V_i / |V_i|, V = W + s B A, for the rows i.

    This is the adapter of the paper's formula and of its configuration for fine-tuning with factors. Their
    optimiser is :func:`rankwise.optimizers.grad_norm_lorp`: Adam on the gradients of B and A, projected to some
    directions that are found anew every few hundred steps. With r directions or more, as in the published
    scripts, that saves nothing. :func:`rankwise.optimizers.weight_norm` trains whole weights by direction and
    length.

    The norms |V_i| are constants to the gradient in the published code, which takes the layer of DoRA: it is
    then ``Lora(magnitudes=True)`` with other defaults. Weight normalisation differentiates them: with
    ``constant=False`` the gradient of V is c_i / |V_i| (G_i - (G_i v_i) v_i), where v_i = V_i / |V_i|, with no
    part along the row.

    The authors' code has two other algorithms under the same name, which are not here. Its optimiser for whole
    weights overwrites the lengths that it has learnt at each step, so that it does no weight normalisation, and
    turns vectors of zeros into NaN; the one named for pre-training changes no weight at all. Here rows of zeros
    stay finite.

    Args:
        rank: r.
        alpha: s = alpha / rank; None means s = 1.
        dropout: share of the branch's inputs that are dropped while training.
        constant: no gradient goes through the norms.
        start: from :mod:`rankwise.initialisers`.
        ranks: from :mod:`rankwise.rank_rules`; None gives all layers the same.

    Learning rate: the general one. The authors' scripts take 3e-5 on GLUE, where their optimiser multiplies the
    steps of B and A by 4, and 0.01 with a quarter of the step for pre-training; neither is of plain AdamW.

    References: Huang et al., "Gradient weight-normalized low-rank projection for efficient LLM training", AAAI
        2025, arXiv 2412.19616, whose formula is known from a summary; Salimans and Kingma, "Weight
        normalization", NeurIPS 2016, arXiv 1602.07868, for the gradient through the norms.

    >>> import torch
    >>> from rankwise.matrices import Dense
    >>> adapted = GradNormLorp(rank=2).attach(Base(Dense(torch.eye(4))), {}, Generator())
    >>> sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    20
    """

    rank: int = 8
    alpha: float | None = 16.0
    dropout: float = 0.1
    constant: bool = True
    start: Initialiser = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self._lora  # it checks the fields

    @property
    def _lora(self) -> Lora:
        return Lora(rank=self.rank, alpha=self.alpha, dropout=self.dropout, start=self.start)

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        """What the start reads."""
        return self._lora.needs

    def largest(self, m: int, n: int) -> int:
        """That of the start."""
        return self.start.largest(m, n)

    def attach(self, base: Base, stats: Stats, generator: Generator) -> StructuredMatrix:
        """Return W + s B A with rows of trained lengths."""
        return RowNormalised.of(base, self._lora.branch(base, stats, generator), self.constant)
