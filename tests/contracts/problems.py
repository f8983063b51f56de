"""Weights and statistics for the suites about methods."""

from collections.abc import Iterable

import torch
from contracts.examples import draw
from torch import Tensor

from rankwise.core.statistics import Statistic, Stats


def fill(needs: Iterable[type[Statistic]], x: Tensor, grad: Tensor) -> Stats:
    """The statistics of inputs x (t, n) and output gradients grad (t, m)."""
    stats: dict[type[Statistic], Statistic] = {}
    for kind in needs:
        statistic = stats[kind] = kind(grad.shape[1], x.shape[1])
        statistic.update(None if kind.side == "output" else x, None if kind.side == "input" else grad)
    return stats


def exactly(kind: type[Statistic], value: Tensor) -> Statistic:
    """A statistic of a known value, in float64."""
    statistic = kind(len(value), len(value))
    statistic.sum, statistic.count = value.double(), 1
    return statistic


def correlated(tokens: int, size: int, seed: int) -> Tensor:
    """Rows of very different sizes, mixed."""
    scales = torch.logspace(0, -2, size, dtype=torch.float64)
    return draw(tokens, size, seed=seed) * scales @ torch.linalg.qr(draw(size, size, seed=seed + 1))[0]


def weights() -> dict[str, Tensor]:
    """Shapes and ranks at the edge of what a layer may be."""
    return {
        "square": draw(12, 12),
        "tall": draw(17, 6),
        "wide": draw(6, 17),
        "one row": draw(1, 9),
        "one column": draw(9, 1),
        "one number": draw(1, 1),
        "rank one": draw(10, 1) @ draw(1, 8, seed=1),
        "zero": torch.zeros(10, 8, dtype=torch.float64),
    }


def tokens(m: int, n: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and output gradients, from plenty to very little."""
    x, grad = correlated(400, n, 3), correlated(400, m, 5)
    dead = x.clone()
    dead[:, 0] = 0
    return {
        "many": (x, grad),
        "eight": (x[:8], grad[:8]),
        "one, repeated": (x[:1].repeat(50, 1), grad[:1].repeat(50, 1)),
        "dead input feature": (dead, grad),
    }
