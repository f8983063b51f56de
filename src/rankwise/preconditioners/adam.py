"""Adam, which takes every number for itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..core.methods import Preconditioner
from ..core.statistics import Statistics
from ..matrices import StructuredMatrix


@dataclass(frozen=True, kw_only=True)
class Adam(Preconditioner):
    """Divide each number's mean gradient by the root of its mean square.

    Args:
        lr: the largest learning rate; weights are of the order of 0.1.
        momentum: of the mean gradient.
        memory: of the mean square.

    References: Kingma and Ba, "Adam: a method for stochastic optimization", 2015, arXiv 1412.6980.
    """

    lr: float = 3e-5
    momentum: float = 0.9
    memory: float = 0.95

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr must be > 0, got {self.lr}.")
        for name in ("momentum", "memory"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 0 and < 1, got {getattr(self, name)}.")

    def optimizer(
        self,
        matrices: Mapping[str, StructuredMatrix],
        biases: Mapping[str, nn.Parameter],
        others: Sequence[nn.Parameter],
        statistics: Statistics,
    ) -> torch.optim.Optimizer:
        """Return Adam over everything."""
        parameters = [p for matrix in matrices.values() for p in matrix.parameters()]
        return torch.optim.Adam(
            [*parameters, *biases.values(), *others], lr=self.lr, betas=(self.momentum, self.memory)
        )
