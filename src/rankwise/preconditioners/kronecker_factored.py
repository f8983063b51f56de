"""Natural-gradient steps in the metric of the loss, for the numbers that structured matrices store."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ..core.methods import Preconditioner
from ..core.statistics import InputGram, OutputGradGram, Statistic, Statistics
from ..matrices import StructuredMatrix
from .blocks import BiasBlock, Block, ScaledBlock, Side, blocks_of, side_of
from .natural_gradient import NaturalGradient


@dataclass(frozen=True, kw_only=True)
class KroneckerFactored(Preconditioner):
    """Step where the loss falls most for a given change of the model's predictions.

    A change D of a weight changes the loss by about <G, D> + 1/2 tr(S D C D'), with G its gradient, C = E[x x']
    and S = E[g g']. For low-rank matrices in both gauges the step is the minimiser of that over all first-order
    changes of the matrix, each matrix for itself; for entries, scales and offsets the metric's diagonal takes the
    metric's place, and for parts of products the metric is carried through the other parts.

    The damping is large on purpose: an undamped step makes the noise of a gradient large in the directions where
    the metric is small.

    Args:
        lr: share of that step; the matrices are coupled, so that 1 goes too far.
        momentum: of the mean gradient.
        input_damping: multiple of mean(diag C) added to C's diagonal.
        output_damping: multiple of mean(diag S) added to S's diagonal.
        others_lr: how far parameters that are no matrix, such as the gains of norms, go in a step of Adam.
        trust: the largest change of the loss, in nats a row, that one step may make by the metric.

    References: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature",
        2015, arXiv 1503.05671; the bound on a step is that of Ba, Grosse and Martens, "Distributed second-order
        optimization using Kronecker-factored approximations", 2017.
    """

    lr: float = 0.1
    momentum: float = 0.9
    input_damping: float = 100.0
    output_damping: float = 10.0
    trust: float = 0.01
    others_lr: float = 0.002
    needs: ClassVar[tuple[type[Statistic], ...]] = (InputGram, OutputGradGram)

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be >= 0 and < 1, got {self.momentum}.")
        for name in ("lr", "input_damping", "output_damping", "trust", "others_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}.")

    def optimizer(
        self,
        matrices: Mapping[str, StructuredMatrix],
        biases: Mapping[str, nn.Parameter],
        others: Sequence[nn.Parameter],
        statistics: Statistics,
    ) -> torch.optim.Optimizer:
        """Return the optimiser."""
        known: dict[int, Side] = {}  # layers may share a statistic of their inputs

        def side(name: str, kind: type[Statistic], damping: float) -> Side:
            statistic = statistics.of(name, self.needs)[kind]
            if id(statistic) not in known:
                like = next(matrices[name].parameters(), statistic.sum)
                known[id(statistic)] = side_of(statistic.value(), damping).to(like)
            return known[id(statistic)]

        blocks: list[Block] = []
        for name, matrix in matrices.items():
            outputs = side(name, OutputGradGram, self.output_damping)
            blocks += blocks_of(matrix, outputs, side(name, InputGram, self.input_damping))
            if name in biases:
                blocks.append(BiasBlock(biases[name], outputs))
        blocks += [ScaledBlock(parameter, self.others_lr / self.lr) for parameter in others]
        return NaturalGradient(blocks, lr=self.lr, momentum=self.momentum, trust=self.trust)
