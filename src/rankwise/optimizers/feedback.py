"""Error feedback: what a subspace misses is not lost but waits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.states import State
from .project import Rest


@dataclass(frozen=True)
class Feedback(Rest):
    """Add what lies outside the subspace to the next gradient; this takes a number for each entry.

    What was projected and what still waits are the sum of all gradients.
    """

    def init(self, param: Tensor, index: Tensor) -> State:
        """Nothing waits."""
        return {"error": torch.zeros_like(param)}

    def lead(self, grad: Tensor, state: State) -> Tensor:
        """The gradient and what has waited."""
        return grad + state["error"]

    def update(self, rest: Tensor, low: Tensor, direction: Tensor, state: State) -> Tensor:
        """Remember the rest, and make no step of it: (1, 1, 1)."""
        state["error"].copy_(rest)
        return rest.new_zeros(1, 1, 1)
