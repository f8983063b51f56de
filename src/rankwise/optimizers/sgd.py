"""Momentum, and SGD with it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.states import State
from ..core.transforms import Transform


@dataclass(frozen=True, kw_only=True)
class Momentum(Transform):
    """Replace gradients by a running sum or mean of them.

    M <- beta M + w g with w = 1, or 1 - beta for a mean; the direction is M, or with Nesterov's look ahead
    beta M + w g.

    Args:
        beta: how much stays at each step.
        nesterov: look one step ahead.
        average: keep a mean instead of a sum.
    """

    beta: float = 0.9
    nesterov: bool = False
    average: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must be from 0 to below 1, got {self.beta}.")

    def init(self, param: Tensor, index: Tensor) -> State:
        """The sum, if there is momentum at all."""
        return {"momentum": torch.zeros_like(param)} if self.beta else {}

    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """The direction (k, ...)."""
        if not self.beta:
            return grad
        weight = 1 - self.beta if self.average else 1.0
        momentum = state["momentum"].mul_(self.beta).add_(grad, alpha=weight)
        return torch.add(grad * weight, momentum, alpha=self.beta) if self.nesterov else momentum

    @property
    def elementwise(self) -> bool:
        """It is."""
        return True

    def rotate(self, state: State, rotation: Tensor) -> None:
        """Rotate the sum."""
        if self.beta:
            state["momentum"].copy_(rotation @ state["momentum"])


def sgd(*, beta: float = 0.0, nesterov: bool = False) -> Transform:
    """Stochastic gradient descent, with momentum if ``beta`` is above zero; the same numbers as torch's.

    >>> sgd(beta=0.9)
    Momentum(beta=0.9, nesterov=False, average=False)

    Args:
        beta: how much of the running sum of gradients stays at each step.
        nesterov: look one step ahead.
    """
    return Momentum(beta=beta, nesterov=nesterov)
