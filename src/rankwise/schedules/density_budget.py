"""A budget of changed entries over all layers that falls while they train (SNELLA)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.budgets import BudgetSettings, FallingBudget, scores_of
from ..core.methods import Course
from ..core.sharing import shared
from ..matrices import Frozen, Kernelled, Recomputed, StructuredMatrix


@dataclass(frozen=True, kw_only=True)
class DensitySettings(BudgetSettings):
    """The fields of :class:`DensityBudget` but the target, which the adapter has, too."""

    warmup: float = 0.0
    tail: float = 0.0
    every: int = 1


@dataclass(frozen=True, kw_only=True)
class DensityBudget(DensitySettings, FallingBudget):
    """Give the layers for which the loss is sensitive more entries to change; fewer and fewer, by a cubic law.

    The competition has two levels. A layer's score is the mean score of its points p, plus that of its points q,
    the scores being those of :class:`TripletBudget`; each layer gets a share of the budget in proportion to its
    score, at least one entry and at most all, and what one layer cannot take goes to the others in the same way.
    In a layer its largest entries of the moment change, as always.

    Scores do not know how large a layer is, as published: a small one may get all of its entries, and a large one
    few. Under torch.compile each choice compiles anew: make ``every`` large. Layers whose points ask for no
    gradient stay as they are, and the budget leaves them out.

    Args:
        target: share of the entries of the layers that train that change in the end; the start is what they have.
        warmup: share of the steps before the budget falls, in [0, 1).
        tail: share of the steps after it fell, in [0, 1).
        every: steps between two choices.
        sensitivity: how much a running mean of sensitivities keeps, in [0, 1).
        uncertainty: how much a running mean of distances keeps, in [0, 1).

    References: "Kernelized sparse fine-tuning with bi-level parameter competition for vision models" (SNELLA),
        2025, arXiv 2510.24037. Here shares are rounded so that they add up to the budget; the published code
        rounds in a loop that may not end, and counts gradients that are not finite as zero, which is an error
        here.
    """

    target: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target, bool) or not 0 < self.target <= 1:
            raise ValueError(f"target must be > 0 and <= 1, got {self.target!r}.")

    def check(self, matrix: StructuredMatrix) -> None:
        """Raise unless it is made of a Kernelled."""
        kernel_of(matrix)

    def before(self, course: Course) -> None:
        """Take the sensitivities in."""
        if course.done < self.last(course.steps):
            for name, kernel in _trained(course).items():
                points = (("outputs", kernel.outputs), ("inputs", kernel.inputs))
                state = course.state.setdefault(name, {})
                self.observe(points, state)

    def after(self, course: Course) -> None:
        """Choose how many entries of each layer change."""
        sizes = {name: kernel.shape[0] * kernel.shape[1] for name, kernel in _trained(course).items()}
        if not sizes or not self.chooses(course):
            return
        first = sum(int(course.state[name]["first"]) for name in sizes)
        last = min(first, max(len(sizes), round(self.target * sum(sizes.values()))))
        budget = self.budget(course.done, course.steps, first, last)
        scores = [_score(name, course.state[name]) for name in sizes]
        for name, count in zip(sizes, shared(budget, scores, list(sizes.values())), strict=True):
            course.state[name]["density"] = _number(count / sizes[name])

    def settle(self, course: Course) -> None:
        """Let as many entries change as were chosen; at first, as many as there are."""
        for name, kernel in _kernels(course).items():
            state = course.state.setdefault(name, {})
            state.setdefault("first", torch.tensor(kernel.kept))
            kernel.density = float(state.setdefault("density", _number(kernel.density)))


def kernel_of(matrix: StructuredMatrix) -> Kernelled:
    """Return the Kernelled that is no frozen start.

    Raises:
        ValueError: if there is none.
    """
    parts = list(matrix.modules()) if isinstance(matrix, Recomputed) else []
    frozen = {inner for part in parts if isinstance(part, Frozen) for inner in part.modules()}
    for part in parts:
        if isinstance(part, Kernelled) and part not in frozen:
            return part
    raise ValueError("DensityBudget acts on a Recomputed around a Kernelled that is not Frozen.")


def _kernels(course: Course) -> Mapping[str, Kernelled]:
    return {name: kernel_of(matrix) for name, matrix in course.matrices.items()}


def _trained(course: Course) -> Mapping[str, Kernelled]:
    """Those whose points train."""
    kernels = _kernels(course).items()
    return {name: each for name, each in kernels if each.outputs.requires_grad or each.inputs.requires_grad}


def _number(density: float) -> Tensor:
    return torch.tensor(density, dtype=torch.float64)  # as exactly as it stands in a spec


def _score(name: str, state: Mapping[str, Tensor]) -> float:
    return float(sum(scores_of(name, points, state).double().mean() for points in ("outputs", "inputs")))
