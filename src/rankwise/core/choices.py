"""The sizes a layer may take, and how an allocator sees them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor

from ..matrices import StructuredMatrix
from .statistics import Stats

Unit = Literal["params", "bytes", "macs", "latency"]
BUDGETS: tuple[Unit, ...] = get_args(Unit)
UNITS: tuple[Unit, ...] = ("params", "bytes", "macs")  # what a method states; latency is measured


@dataclass(frozen=True)
class Choices:
    """The structured matrices that may take the place of one weight, smallest first.

    Args:
        costs: for each unit, (k,) integers: stored numbers, stored bytes, multiply-adds of one input row.
        errors: (k,) predicted damage.
        total: predicted damage of putting zero in place of the weight.
        build: makes choice i, in the dtype of the weight.
        refit: makes choice i of another weight of this shape, (m, n), from other statistics.
        error_of: measures the damage of an (m, n) change of the weight, with the same formula as ``errors``.
        spectrum: the singular values that the errors are sums of, largest first, where there are any.
        mean: E[x] (n,), where the errors hold once D E[x], for the change D of the weight, is added to the bias.
    """

    costs: Mapping[Unit, Tensor]
    errors: Tensor
    total: float
    build: Callable[[int], StructuredMatrix]
    refit: Callable[[int, Tensor, Stats], StructuredMatrix]
    error_of: Callable[[Tensor], float]
    spectrum: Tensor | None = None
    mean: Tensor | None = None


def nothing() -> Choices:
    """Return the choices of a layer that stays as it is."""
    none = torch.zeros(0, dtype=torch.int64)

    def build(i: int, *_: object) -> StructuredMatrix:
        raise IndexError(f"there is no choice {i}.")

    return Choices({unit: none for unit in UNITS}, none.double(), 0.0, build, build, lambda change: 0.0)


@dataclass(frozen=True)
class Ladder:
    """The choices of one layer under a budget, cheapest first; the last one leaves the layer as it is.

    Args:
        costs: (k,) integers in the unit of the budget, increasing; the last is the dense layer's.
        errors: (k,) damage; the last is 0.
        index: (k - 1,) which entry of the :class:`Choices` each step is.
        total: damage of zero in place of the weight.
        spectrum: see :class:`Choices`.
    """

    costs: Tensor
    errors: Tensor
    index: Tensor
    total: float
    spectrum: Tensor | None = None

    @classmethod
    def of(cls, choices: Choices, unit: Unit, dense: int) -> "Ladder":
        """Keep the choices that are cheaper than the dense layer, and add the dense layer.

        A choice that costs as much as another and errs no less, or more and no less, is left out.
        """
        costs = choices.costs[unit]
        index = (costs < dense).nonzero()[:, 0]
        index = index[choices.errors[index].argsort(stable=True)]
        index = index[costs[index].argsort(stable=True)]  # by cost, then by error
        least = choices.errors[index].cummin(0).values
        better = torch.ones(len(index), dtype=torch.bool)
        better[1:] = choices.errors[index][1:] < least[:-1]
        index = index[better]
        errors = torch.cat([choices.errors[index].double(), torch.zeros(1, dtype=torch.float64)])
        costs = torch.cat([costs[index], torch.tensor([dense])])
        return cls(costs, errors, index, choices.total, choices.spectrum)


Allocator = Callable[[Mapping[str, Ladder], int], dict[str, int]]
"""Spends a budget: for each layer the position on its ladder, with total cost at most the budget."""


def budget_of(keep: float, whole: int) -> int:
    """Return the most of ``whole`` (1 or more) whose share of it, as a float, is at most ``keep``.

    >>> budget_of(0.29, 100), int(0.29 * 100)
    (29, 28)
    """
    near = int(keep * whole)
    return next(most for most in (near + 1, near, near - 1) if most / whole <= keep)


def least_keep(least: int, whole: int) -> str:
    """Return the smallest share of four digits that keeps ``least`` of ``whole``.

    >>> least_keep(1, 3)
    '0.3334'
    """
    return f"{math.ceil(Fraction(least, whole) * 10_000) / 10_000:.4f}"


def check_budget(ladders: Mapping[str, Ladder], budget: int) -> None:
    """Raise if even the smallest choice of every layer takes more than the budget."""
    least = sum(int(ladder.costs[0]) for ladder in ladders.values())
    if least > budget:
        whole = sum(int(ladder.costs[-1]) for ladder in ladders.values())
        if least == whole:
            raise ValueError(
                "the method offers nothing smaller than the dense layers in this unit; budget another one "
                "(low-bit numbers are smaller in bytes alone), or use another method."
            )
        raise ValueError(
            f"the budget {budget} cannot be met: the smallest choices take {least} of {whole}; "
            f"keep must be at least {least_keep(least, whole)}."
        )


def cost_of(ladders: Mapping[str, Ladder], picks: Mapping[str, int]) -> int:
    """Return what the picked choices cost together."""
    return sum(int(ladders[name].costs[i]) for name, i in picks.items())


def spend(allocate: Allocator, ladders: Mapping[str, Ladder], budget: int) -> dict[str, int]:
    """Have an allocator spend a budget on the layers that have a choice; the others stay dense.

    Raises:
        ValueError: if the budget cannot be met.
        RuntimeError: if the allocator spent more.
    """
    check_budget(ladders, budget)
    free = {name: ladder for name, ladder in ladders.items() if len(ladder.index)}
    fixed = {name: 0 for name in ladders.keys() - free.keys()}
    picks = fixed | (allocate(free, budget - cost_of(ladders, fixed)) if free else {})
    if (cost := cost_of(ladders, picks)) > budget:
        raise RuntimeError(f"allocator {allocate} spent {cost} of {budget}.")
    return {name: picks[name] for name in ladders}
