"""Rows drawn by their squared lengths and scaled are as good as all, on average."""

import itertools

import pytest
import torch
from torch import Generator

from rankwise.linalg import draw_important, importance_scales

U = torch.tensor([[1.0, 0.5, -2.0], [0.0, 3.0, 1.0]], dtype=torch.float64)  # columns of two numbers
SQUARES = U.square().sum(0)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_all_possible_draws_together_are_unbiased(count: int):
    chances = SQUARES / SQUARES.sum()
    mean = torch.zeros(2, 2, dtype=U.dtype)
    for draw in itertools.product(range(3), repeat=count):
        rows = torch.tensor(draw)
        kept = U[:, rows] * importance_scales(SQUARES, rows)
        mean += chances[rows].prod() * kept @ kept.mT
    torch.testing.assert_close(mean, U @ U.mT)


def test_many_draws_come_as_close_as_their_variance_says():
    """The sum over draws of x_k / (r p_k), with x_k = (w'u_k)^2, has the variance (sum x^2/p - (sum x)^2) / r."""
    rng, trials, count = Generator().manual_seed(0), 4000, 2
    chances, way = SQUARES / SQUARES.sum(), torch.tensor([0.6, -0.8], dtype=U.dtype)
    x = (way @ U).square()
    deviation = ((x.square() / chances).sum() - x.sum() ** 2).div(count * trials).sqrt()
    found = torch.zeros((), dtype=U.dtype)
    for _ in range(trials):
        rows = draw_important(SQUARES, count, rng, replacement=True)
        found += (way @ U[:, rows] * importance_scales(SQUARES, rows)).square().sum() / trials
    assert abs(found - x.sum()) < 4 * deviation
    assert deviation < 0.05 * x.sum()


def test_draws_without_replacement_are_different_rows_and_never_zeros():
    squares = torch.tensor([0.0, 1e-30, 5e-30, 0.0, 2e-30])
    rows = draw_important(squares, 3, Generator().manual_seed(0), replacement=False)
    assert sorted(rows.tolist()) == [1, 2, 4]


@pytest.mark.parametrize("n", [0, 3])
def test_nothing_is_drawn_from_nothing(n: int):
    assert len(draw_important(torch.zeros(n), 2, Generator(), replacement=True)) == 0
