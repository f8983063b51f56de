"""When bases are fitted again."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.methods import check_count
from ..core.states import State, counter
from ..core.subspaces import Measure, Refresh

GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Every(Refresh):
    """Fit again every so many steps; parameters take turns, so that no step is much longer than another.

    Parameter i is fitted when the number of steps since the first, modulo ``steps``, is the part of
    ``i * 0.618...`` behind the point, times ``steps``: this spreads any number of parameters evenly.

    Args:
        steps: between two fits of a parameter.
        together: fit all at the same step instead.
    """

    steps: int = 200
    together: bool = False

    def __post_init__(self) -> None:
        check_count("steps", self.steps)

    def init(self, index: Tensor) -> State:
        """The turn of each parameter."""
        turn = (index.double() * GOLDEN).frac() * self.steps
        return {"turn": counter(index) if self.together else turn.long()}

    def due(self, step: Tensor, state: State, share: Measure) -> Tensor:
        """Whether it is the parameter's turn."""
        return (step - 1) % self.steps == state["turn"]


@dataclass(frozen=True, kw_only=True)
class EnergyDrop(Refresh):
    """Look every so many steps, by turns, and fit where the basis holds clearly less of the gradient than before.

    What is compared is the share of |gradient|^2 inside the subspace, now and just after the last fit: the
    subspace as a whole counts, not single vectors or signs.

    Args:
        steps: between two looks.
        below: fit when the share is below this multiple of the share after the last fit.
    """

    steps: int = 50
    below: float = 0.9

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        if not 0 < self.below <= 1:
            raise ValueError(f"below must be above 0 and at most 1, got {self.below}.")

    def init(self, index: Tensor) -> State:
        """The turn of each parameter, and the share after its last fit."""
        return {**Every(self.steps).init(index), "share": torch.zeros_like(index, dtype=torch.float32)}

    def due(self, step: Tensor, state: State, share: Measure) -> Tensor:
        """Whether it is the parameter's turn, and its share has dropped."""
        turn = Every(self.steps).due(step, state, share)
        return turn & (share() < self.below * state["share"]) if bool(turn.any()) else turn

    def fitted(self, state: State, share: Measure, overlap: Measure) -> None:
        """Remember the share."""
        state["share"].copy_(share())
