"""The optimiser that steps along preconditioned gradients, no further than a trust region."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .blocks import Block


class NaturalGradient(torch.optim.Optimizer):
    """Preconditions the mean gradient of each block and steps along it.

    Args:
        blocks: each with a metric of its own.
        lr: 1 is the minimiser of each block's quadratic model.
        momentum: of the mean gradient, which is corrected for starting at zero.
        trust: the largest 1/2 |step|^2 in the metric, summed over the blocks; longer steps are shortened.
    """

    def __init__(self, blocks: Sequence[Block], *, lr: float, momentum: float, trust: float) -> None:
        self.blocks, self.trust = list(blocks), trust
        groups = [{"params": list(block.parameters)} for block in self.blocks]
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take a step; blocks without a gradient stay."""
        changes: list[tuple[Block, Sequence[Tensor], list[Tensor], float]] = []
        length = 0.0
        for block, group in zip(self.blocks, self.param_groups, strict=True):
            gradients = block.gradients()
            if not gradients:
                continue
            means = self._means(block, gradients, group["momentum"])
            correction = 1 - group["momentum"] ** self.state[block.parameters[0]]["step"]
            change = block.solve([mean / correction for mean in means])
            inner = sum(float((g * c).sum()) for g, c in zip(means, change, strict=True)) / correction
            length += 0.5 * group["lr"] ** 2 * inner
            changes.append((block, change, means, group["lr"]))
        scale = min(1.0, math.sqrt(self.trust / length)) if length > 0 else 1.0
        for block, change, means, rate in changes:
            for i, turn in enumerate(block.move(change, -scale * rate)):
                if turn is not None:
                    means[i].copy_(means[i] @ turn if i == 0 else turn @ means[i])

    def _means(self, block: Block, gradients: Sequence[Tensor], momentum: float) -> list[Tensor]:
        state = self.state[block.parameters[0]]
        if not state:
            state["step"], state["means"] = (
                0,
                [each.new_zeros(each.shape) for each in gradients],
            )  # contiguous, as when loaded
        state["step"] += 1
        for mean, gradient in zip(state["means"], gradients, strict=True):
            mean.lerp_(gradient, 1 - momentum)
        return state["means"]
