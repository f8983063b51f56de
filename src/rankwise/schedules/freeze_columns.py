"""A factor that stops training column by column (LaMDA)."""

from dataclasses import dataclass

import torch
from torch import nn

from ..core.methods import Course, Schedule
from ..core.processes import several
from ..matrices import Dense, Frozen, StructuredMatrix


@dataclass(frozen=True, kw_only=True)
class FreezeSettings:
    """The fields of :class:`FreezeColumns`, which the adapter has, too."""

    until: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise ValueError(f"until must be > 0 and <= 1, got {self.until!r}.")


@dataclass(frozen=True, kw_only=True)
class FreezeColumns(FreezeSettings, Schedule):
    """Freeze the first floor(r i / t) columns of an (m, r) matrix at step i; after t steps none trains.

    A frozen column keeps its bits under any optimiser: gradient, momentum and weight decay do not reach it. When
    all are frozen the matrix asks for no gradients, and the optimiser's state for it is dropped.

    Args:
        until: t as a share of all steps, in (0, 1].

    References: Azizi, Kundu, Pedram, "LaMDA", Findings of EMNLP 2024, arXiv 2406.12832. The released code zeroes
        gradients only, which momentum and weight decay do not mind, and counts far too slowly.
    """

    def check(self, matrix: StructuredMatrix) -> None:
        """Raise unless it is a Dense."""
        if not isinstance(matrix, Dense):
            raise ValueError(f"FreezeColumns acts on a Dense, got {type(matrix).__name__}.")

    def frozen(self, columns: int, done: int, steps: int) -> int:
        """How many columns are frozen after so many of the steps."""
        last = max(1, round(self.until * steps))
        return columns * min(done, last) // last

    def before(self, course: Course) -> None:
        """Remember the frozen columns."""
        for name, weight in _weights(course):
            count = self.frozen(weight.shape[1], course.done, course.steps)
            course.state[name] = {"kept": weight.detach()[:, :count].clone()} if weight.requires_grad else {}

    @torch.no_grad()
    def after(self, course: Course) -> None:
        """Put the frozen columns back."""
        for name, weight in _weights(course):
            for kept in course.state.pop(name).values():
                weight[:, : kept.shape[1]] = kept

    def settle(self, course: Course) -> None:
        """Let a matrix whose columns are all frozen ask for no gradients.

        Among several processes it goes on asking, as these wait for the gradients that there were at first.
        """
        if several():
            return
        for _, weight in _weights(course):
            if self.frozen(weight.shape[1], course.done, course.steps) == weight.shape[1]:
                weight.requires_grad_(False)
                weight.grad = None  # optimisers leave such a parameter alone
                course.optimizer.state.pop(weight, None)

    def finished(self, matrix: StructuredMatrix) -> StructuredMatrix:
        """It is frozen for good."""
        return Frozen(matrix)


def _weights(course: Course) -> list[tuple[str, nn.Parameter]]:
    return [(name, matrix.get_parameter("weight")) for name, matrix in course.matrices.items()]
