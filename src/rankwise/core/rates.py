"""How large the learning rate is, and how it goes over a run."""

import math
from dataclasses import dataclass

GENERAL = 5e-4  # of AdamW, where a method suggests none: that of LoRA
WHOLE = 5e-5  # of AdamW, where a model trains without adapters: transformers' default, a tenth of LoRA's
OFFSET = 1e-3  # of the run: the first step counts a little


@dataclass(frozen=True)
class Linear:
    """Up along a line, then down to zero along another.

    Args:
        warmup: share of the run that goes up.

    >>> round(Linear(0.5)(0.25), 3), Linear(0.5)(0.5), Linear(0.5)(0.75), Linear()(1.0)
    (0.502, 1.0, 0.5, 0.0)
    """

    warmup: float = 0.05

    def __post_init__(self) -> None:
        _check(self.warmup)

    def __call__(self, done: float) -> float:
        """Return the share of the largest rate where a share of the run is done."""
        return min(_up(done, self.warmup), max(1 - done, 0.0) / (1 - self.warmup))


@dataclass(frozen=True)
class Cosine:
    """Up along a line, then down to zero along half a cosine.

    Args:
        warmup: share of the run that goes up.

    >>> round(Cosine(0.2)(0.6), 3), round(Cosine()(1.0), 3)
    (0.5, 0.0)
    """

    warmup: float = 0.03

    def __post_init__(self) -> None:
        _check(self.warmup)

    def __call__(self, done: float) -> float:
        """Return the share of the largest rate where a share of the run is done."""
        if done < self.warmup:
            return _up(done, self.warmup)
        return (1 + math.cos(math.pi * min((done - self.warmup) / (1 - self.warmup), 1.0))) / 2


def check_rate(lr: float, name: str = "lr") -> None:
    """Raise unless a learning rate is a positive number."""
    if not 0 < lr < math.inf:
        raise ValueError(f"{name} must be a number > 0, got {lr}.")


def _up(done: float, warmup: float) -> float:
    return min(1.0, (done + OFFSET) / warmup) if warmup else 1.0


def _check(warmup: float) -> None:
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup must be >= 0 and < 1, got {warmup}.")
