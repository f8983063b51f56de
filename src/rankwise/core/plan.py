"""How long a run takes, and where it stands."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .rates import Linear


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long to train, on how much at a time, and how often to look at the held-out data.

    Args:
        seconds: the time budget, everything counted; infinite only where ``steps`` is given.
        steps: the largest number of steps, or None for as many as the time allows.
        rows: tokens (rows, samples) a step.
        pieces: take so many pieces of the data a step, instead of ``rows``.
        every: steps between two looks at the held-out data, each followed by a checkpoint.
        patience: stop after so many looks without a better one; None never stops early.
        back: after a look that is no better, go back to the best numbers, forget what the optimizer has gathered,
            and go on at this share of the learning rate; None goes on from where it is.
        seed: of the order of the data, and of dropout.
        rate: share of the learning rate where a share of the run is done.
        last: the numbers of the last look remain, not the best ones.
        clip: the longest gradient, over all parameters, in the 2-norm; longer ones are shortened.
        autocast: run the model in this type; the trained numbers keep theirs.
        spare: keep a copy of the best numbers, which the model holds in the end. Without it a run takes less
            memory, and the present numbers remain, also after an interrupt or an error.
    """

    seconds: float = 600.0
    steps: int | None = None
    rows: int = 4096
    pieces: int | None = None
    every: int = 4
    patience: int | None = 4
    back: float | None = None
    seed: int = 0
    rate: Callable[[float], float] = field(default_factory=Linear)
    last: bool = False
    clip: float | None = None
    autocast: torch.dtype | None = None
    spare: bool = True

    def __post_init__(self) -> None:
        if not self.seconds > 0 or (self.steps is None and self.seconds == float("inf")):
            raise ValueError(f"the budget must be a positive number of seconds, got {self.seconds}.")
        if self.back is not None and not (0 < self.back < 1 and self.spare):
            raise ValueError(
                f"back must be > 0 and < 1, with spare numbers to go back to, or None; got {self.back}."
            )
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive or None, got {self.clip}.")
        for name in ("steps", "rows", "pieces", "every", "patience"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be >= 1 and whole, got {value}.")


def between_looks(steps: int) -> int:
    """Return how many steps lie between two looks, so that there are ten in so many steps, or fewer.

    >>> between_looks(100), between_looks(19), between_looks(3)
    (10, 2, 1)
    """
    return max(1, math.ceil(steps / 10))


@dataclass
class Progress:
    """Where a run stands: all of it is in a checkpoint."""

    step: int = 0
    seconds: float = 0.0
    rows: int = 0
    skipped: int = 0
    stale: int = 0
    share: float = 1.0  # of the learning rate, lowered each time the run goes back
    best_step: int = 0
    best: float = float("inf")
    order: list[int] = field(default_factory=list)  # what is left of this pass over the data
    history: list[dict[str, Any]] = field(default_factory=list)
