"""Ranks go where a low-rank step is predicted to lower the loss most."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.methods import RankRule, check_most
from ..core.statistics import InputGram, OutputGradGram, Statistic, Stats, WeightGradient
from ..linalg import Metric
from ..matrices import StructuredMatrix

LEAST = 1e-3  # of what a layer looks worth, so that the ranks that sound layers cannot take go somewhere


@dataclass(frozen=True, kw_only=True)
class PredictedDecrease(RankRule):
    """Rank r is worth the decrease of the loss, in nats a row, that the best step of rank r is predicted to make.

    A change D of a weight changes the loss by about <G, D> + 1/2 tr(S D C D'), with G = E[g x'] the mean
    gradient, S = E[g g'] and C = E[x x']. In coordinates where both metrics are the identity, S^-1/2 G C^-1/2 =
    U diag(s) V', the best D of rank r is -U_r diag(s_r) V_r', and the loss falls by 1/2 (s_1^2 + ... + s_r^2),
    the same unit in all layers. All three come from one pass, held against labels of the data: at the weights
    as they are, labels drawn from the model leave no gradient.

    G is a mean over t rows, whose noise alone looks worth 1/2 tr(S (S + damping)^-1) tr(C (C + damping)^-1) / t
    if rows are independent: 1/2 m n / t without damping, so that large layers would get ranks for nothing. What
    a layer is worth is multiplied by the share of all its directions' worth that is not this.

    Args:
        most: the largest rank of a layer, as a multiple of the average; 1 gives all layers the same.
        input_damping: multiple of mean(diag C) added to C's diagonal. This and the next are large because a
            mean gradient is mostly noise where the metric is small.
        output_damping: multiple of mean(diag S) added to S's diagonal.

    References: the project's own; the metric is that of Martens and Grosse, "Optimizing neural networks with
        Kronecker-factored approximate curvature", 2015, arXiv 1503.05671.
    """

    most: float = 2.0
    input_damping: float = 100.0
    output_damping: float = 10.0

    def __post_init__(self) -> None:
        check_most(self.most)
        for name in ("input_damping", "output_damping"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}.")

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        """The mean gradient of the weight and both factors of the metric."""
        return (InputGram, OutputGradGram, WeightGradient)

    def missed(self, base: StructuredMatrix, stats: Stats, count: int) -> Tensor:
        """Return the decreases that are left."""
        outputs = Metric(stats[OutputGradGram].value(), self.output_damping)
        inputs = Metric(stats[InputGram].value(), self.input_damping)
        whitened = inputs.dual(outputs.dual(stats[WeightGradient].value()).mT)
        squares = torch.linalg.svdvals(whitened).square()
        noise = _size(outputs) * _size(inputs) / stats[WeightGradient].count
        sound = (1 - noise / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)).clamp_min(LEAST)
        left = squares.flip(0).cumsum(0).flip(0)  # from each one to the last
        return 0.5 * sound * torch.cat([left, torch.zeros_like(left[:1])])[: count + 1]


def _size(metric: Metric) -> float:
    """How many directions a moment M has where it is damped: tr(M (M + damping)^-1)."""
    assert metric.value is not None
    return float(metric.dual(metric.dual(metric.value).mT).diagonal().sum())
