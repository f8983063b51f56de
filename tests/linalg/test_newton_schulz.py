"""Newton-Schulz iterations and cosine transforms against their formulas in float64."""

import math

import pytest
import torch
from contracts.examples import draw

from rankwise.linalg import MUON, POLAR_EXPRESS, cosine_rows, cosine_transform, newton_schulz, orthonormal, seeded

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (1, 4)])
@pytest.mark.parametrize("polynomials", [(MUON,) * 5, POLAR_EXPRESS], ids=["muon", "polar express"])
def test_singular_values_go_through_the_polynomials(shape, polynomials):
    values = draw(*shape)
    u, s, vt = torch.linalg.svd(values, full_matrices=False)
    s = s / (s.square().sum().sqrt() + 1e-7)
    for a, b, c in polynomials:
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(newton_schulz(values, polynomials), (u * s) @ vt, **CLOSE)


def test_the_schedule_that_converges_gives_the_polar_factor():
    left, right = torch.linalg.qr(draw(12, 12, seed=1)).Q, torch.linalg.qr(draw(20, 12, seed=2)).Q
    values = (left * torch.logspace(0, -2, 12, dtype=torch.float64)) @ right.mT
    torch.testing.assert_close(newton_schulz(values, POLAR_EXPRESS), left @ right.mT, rtol=0, atol=1e-6)


def test_batches_zeros_and_turns():
    values = torch.stack([draw(4, 7), torch.zeros(4, 7).double(), 1e-3 * draw(4, 7, seed=3)])
    made = newton_schulz(values, POLAR_EXPRESS)
    for one, value in zip(made, values, strict=True):
        torch.testing.assert_close(one, newton_schulz(value, POLAR_EXPRESS), **CLOSE)
    assert float(made[1].abs().max()) == 0
    turn = torch.linalg.qr(draw(4, 4, seed=9)).Q
    torch.testing.assert_close(newton_schulz(turn @ values, POLAR_EXPRESS), turn @ made, **CLOSE)


@pytest.mark.parametrize("size", [1, 2, 7, 8, 33])
def test_cosines_are_orthogonal_and_both_ways_to_them_agree(size):
    whole = cosine_rows(torch.arange(size), size, torch.float64)
    formula = torch.tensor(
        [[math.cos(math.pi * i * (2 * j + 1) / (2 * size)) for j in range(size)] for i in range(size)]
    ).double()
    formula *= math.sqrt(2 / size)
    formula[0] *= math.sqrt(0.5)
    torch.testing.assert_close(whole, formula, rtol=0, atol=1e-6)  # the list was float32
    torch.testing.assert_close(whole @ whole.mT, torch.eye(size).double(), **CLOSE)
    values = torch.stack([draw(size, 5), draw(size, 5, seed=1)])
    torch.testing.assert_close(cosine_transform(values), whole @ values, **CLOSE)


def test_high_cosines_are_exact_in_float32():
    rows = torch.tensor([4095])
    exact = cosine_rows(rows, 4096, torch.float64)
    torch.testing.assert_close(cosine_rows(rows, 4096, torch.float32).double(), exact, rtol=0, atol=1e-8)


def test_orthonormal_columns_keep_their_signs():
    values = draw(8, 3)
    made = orthonormal(values)
    torch.testing.assert_close(made.mT @ made, torch.eye(3).double(), **CLOSE)
    assert bool(((made * values).sum(0) > 0).all())
    torch.testing.assert_close(orthonormal(made), made, **CLOSE)


def test_seeds_of_several_numbers_differ():
    drawn = {
        float(torch.rand((), generator=seeded(*numbers)))
        for numbers in ((0,), (1,), (0, 0), (0, 1), (1, 0), (2, 1), (1, 2))
    }
    assert len(drawn) == 7
