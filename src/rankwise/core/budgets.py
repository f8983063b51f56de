"""What schedules have in common that spend a falling budget on the parts for which the loss is sensitive."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .methods import Course, Schedule, check_count


@dataclass(frozen=True, kw_only=True)
class BudgetSettings:
    """When a budget falls, and how much running means keep."""

    warmup: float = 0.1
    tail: float = 0.5
    every: int = 10
    sensitivity: float = 0.85
    uncertainty: float = 0.85

    def __post_init__(self) -> None:
        check_count("every", self.every)
        for name in ("warmup", "tail", "sensitivity", "uncertainty"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 0 and < 1, got {getattr(self, name)!r}.")
        if not self.warmup + self.tail < 1:
            raise ValueError(
                f"warmup {self.warmup} and tail {self.tail} leave no steps in which the budget falls; "
                "together they must be < 1."
            )


@dataclass(frozen=True, kw_only=True)
class FallingBudget(BudgetSettings, Schedule):
    """A budget that falls by a cubic law, and scores of what it may buy.

    The sensitivity of a number p is |p dL/dp|. Its running mean times the running mean of its distance from that
    mean is the number's score.
    """

    def last(self, steps: int) -> int:
        """The step after which nothing is chosen any more."""
        return max(1, steps - round(self.tail * steps))

    def needed(self, steps: int) -> int:
        """The last choice."""
        return self.last(steps)

    def budget(self, done: int, steps: int, first: int, last: int) -> int:
        """How much is left after so many of the steps: ``first`` at first, ``last`` at last."""
        start, end = round(self.warmup * steps), self.last(steps)
        if done >= end:
            return last
        if done <= start:
            return first
        return last + int((first - last) * (1 - (done - start) / (end - start)) ** 3)

    def chooses(self, course: Course) -> bool:
        """Whether it is time to choose, after a step."""
        end = self.last(course.steps)
        due = course.done % self.every == 0 and course.done > round(self.warmup * course.steps)
        return course.done == end or (course.done < end and due)

    def observe(self, parameters: Iterable[tuple[str, Tensor]], state: dict[str, Tensor]) -> None:
        """Move the running means of parameters with names, whose gradients are there."""
        for name, p in parameters:
            now = torch.zeros_like(p) if p.grad is None else (p * p.grad).abs().detach()
            mean = state.setdefault(f"{name}.mean", torch.zeros_like(now)).lerp_(now, 1 - self.sensitivity)
            spread = state.setdefault(f"{name}.spread", torch.zeros_like(now))
            spread.lerp_((now - mean).abs(), 1 - self.uncertainty)


def scores_of(layer: str, name: str, state: Mapping[str, Tensor]) -> Tensor:
    """Return the scores of a parameter's numbers.

    Raises:
        ValueError: if one is not finite; it names the layer.
    """
    scores = state[f"{name}.mean"] * state[f"{name}.spread"]
    if not bool(scores.isfinite().all()):
        raise ValueError(
            f"layer {layer}: gradients were not finite; lower the learning rate or look at the data."
        )
    return scores
