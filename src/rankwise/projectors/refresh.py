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

    def may_be_due(self, step: Tensor, state: State) -> bool:
        """Whether it is the turn of any."""
        return bool(((step - 1) % self.steps == state["turn"]).any())


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

    def may_be_due(self, step: Tensor, state: State) -> bool:
        """Whether it is the turn of any."""
        return Every(self.steps).may_be_due(step, state)

    def fitted(self, state: State, share: Measure, overlap: Measure) -> None:
        """Remember the share."""
        state["share"].copy_(share())


@dataclass(frozen=True)
class Backoff(Refresh):
    """Fit less and less often where the subspace hardly changes, and as often as at first where it does.

    After each fit the overlap of the old and the new subspace is noted. When the mean of the last few is at least
    ``enough``, the time to the next fit is doubled, else it is ``steps`` again. Parameters take turns as in
    :class:`Every`.

    Args:
        steps: between two fits at first.
        enough: overlap of subspaces, from 0 (no more than by chance) to 1 (the same).
        recent: how many overlaps are looked at; until there are so many nothing changes.
        factor: of the time to the next fit.

    References: Zhang et al., "Q-GaLore", 2024, arXiv 2407.08296. There the signed cosine of the first singular
    vectors is compared, whose sign means nothing, and the time never becomes shorter again. The default of
    ``enough`` is the paper's for that cosine; for overlaps it is not tuned.
    """

    steps: int = 200
    enough: float = 0.4
    recent: int = 5
    factor: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "recent", "factor"):
            check_count(name, getattr(self, name))
        if not 0 <= self.enough <= 1:
            raise ValueError(f"enough must be from 0 to 1, got {self.enough}.")

    def init(self, index: Tensor) -> State:
        """The step of the next fit, the time between fits, how many there were, and the last overlaps."""
        recent = torch.zeros(len(index), self.recent)
        times = {"next": 1 + Every(self.steps).init(index)["turn"], "gap": counter(index, self.steps)}
        return {**times, "fits": counter(index), "overlaps": recent}

    def may_be_due(self, step: Tensor, state: State) -> bool:
        """Whether the time of any has come."""
        return bool((step >= state["next"]).any())

    def due(self, step: Tensor, state: State, share: Measure) -> Tensor:
        """Whether the time has come; the next one is a gap later."""
        due = step >= state["next"]
        state["next"].copy_(torch.where(due, step + state["gap"], state["next"]))
        return due

    def fitted(self, state: State, share: Measure, overlap: Measure) -> None:
        """Note the overlap, of all but a first fit, and choose the time to the next one."""
        known = state["fits"].add_(1) > 1
        if not bool(known.any()):
            return
        moved = torch.cat([state["overlaps"][:, 1:], overlap()[:, None].float()], dim=1)
        overlaps = state["overlaps"].copy_(torch.where(known[:, None], moved, state["overlaps"]))
        stable = (state["fits"] > self.recent) & (overlaps.mean(1) >= self.enough)
        gap = torch.where(stable, state["gap"] * self.factor, self.steps)
        state["next"].add_(gap - state["gap"])
        state["gap"].copy_(gap)
