"""Each measure against what theory says about matrices whose answer is known."""

import math

import pytest
import torch
from torch import Generator, Tensor

from rankwise import measures
from rankwise.measures import ConditionNumber, EffectiveRank, MarchenkoPastur, SpectrumTail, StableRank
from rankwise.measures.spectral import singular_values
from rankwise.measures.spectrum_tail import tail_fit

ALL = [getattr(measures, name) for name in measures.__all__]


def rng(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def noise(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=rng(seed), dtype=torch.float64)


def test_orthogonal():
    q = torch.linalg.qr(noise(64, 64))[0].float()  # rounded: its singular values differ in the last bits
    assert StableRank()(q, {})["stable_rank"] == pytest.approx(64, rel=1e-5)
    assert EffectiveRank()(q, {})["effective_rank"] == pytest.approx(64, rel=1e-5)
    assert ConditionNumber()(q, {})["condition"] == pytest.approx(1, rel=1e-5)
    assert SpectrumTail()(q, {}) == {"alpha": None, "alpha_sigma": None, "tail_values": None}


@pytest.mark.parametrize("measure", ALL)
@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_scale_changes_nothing_but_the_noise(measure, scale):
    w = noise(40, 50) @ noise(50, 50, 1)
    before, after = measure()(w, {}), measure()(w * scale, {})
    if "noise" in before:
        before["noise"] *= scale
    assert after == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("measure", ALL)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (12, 30), (30, 12)])
def test_any_shape_and_type(measure, shape):
    w = noise(*shape)
    for weight in (w, torch.zeros(shape), w.bfloat16(), w.float().requires_grad_()):
        for value in measure()(weight, {}).values():
            assert value is None or math.isfinite(value)


@pytest.mark.parametrize("measure", ALL)
def test_transposing_changes_nothing(measure):
    w = noise(40, 60)
    assert measure()(w, {}) == pytest.approx(measure()(w.T, {}), rel=1e-9)


@pytest.mark.parametrize("measure", ALL)
def test_nan_is_an_error(measure):
    with pytest.raises(ValueError, match="finite"):
        measure()(torch.full((3, 3), math.nan), {})


def test_ranks_of_a_rank_one_matrix():
    w = torch.outer(torch.arange(1.0, 5), torch.ones(6))
    assert StableRank()(w, {})["stable_rank"] == pytest.approx(1)
    assert EffectiveRank()(w, {})["effective_rank"] == pytest.approx(1, rel=1e-4)
    assert ConditionNumber()(w, {}) == {"rank": 1, "condition": None}


def test_rounding_of_a_product_is_no_spectrum():
    low = torch.randn(256, 8, generator=rng()) @ torch.randn(8, 192, generator=rng(1))
    found = ConditionNumber()(low, {}) | MarchenkoPastur()(low, {}) | EffectiveRank()(low, {})
    assert found["rank"] == 8
    assert found["condition"] is None
    assert found["noise"] is None
    wanted = torch.linalg.svdvals(low.double())[:8]
    torch.testing.assert_close(singular_values(low)[:8], wanted)


@pytest.mark.parametrize("shape", [(512, 512), (256, 1024), (1, 9), (9, 1)])
def test_weights_of_full_rank_have_it_in_any_type(shape):
    weight = noise(*shape)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert ConditionNumber()(weight.to(dtype), {})["rank"] == min(shape)


@pytest.mark.parametrize("shape", [(16, 64), (32, 32)])
def test_the_noise_of_small_matrices_is_right_on_average(shape):
    found = [MarchenkoPastur()(noise(*shape, seed), {})["noise"] for seed in range(200)]
    assert abs(sum(found) / len(found) - 1) < 0.015  # the lower of two middle values is 3 to 4 % off


@pytest.mark.parametrize("short", [1000, 500, 250])
def test_noise_is_recognised(short):
    found = MarchenkoPastur()(0.3 * noise(1000, short), {})
    assert found["noise"] == pytest.approx(0.3, rel=0.02)
    assert found["spikes"] <= 1
    assert found["soft_rank"] == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize("short", [1000, 250])
def test_a_planted_spike_is_found(short):
    w = noise(1000, short) / 1000**0.5
    threshold = (short / 1000) ** 0.25  # the Baik-Ben Arous-Peche transition
    u, v = (torch.nn.functional.normalize(noise(k, 1, 5), dim=0) for k in (1000, short))
    assert MarchenkoPastur()(w + 2.5 * threshold * u @ v.T, {})["spikes"] == 1


@pytest.mark.parametrize("alpha", [2.0, 3.5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_alpha_of_pareto_eigenvalues(alpha, seed):
    uniform = torch.rand(500, generator=rng(seed), dtype=torch.float64)
    eigenvalues = (1 - uniform) ** (-1 / (alpha - 1))
    q = torch.linalg.qr(noise(500, 500, seed))[0]
    found = SpectrumTail()(q * eigenvalues.sqrt(), {})
    assert abs(found["alpha"] - alpha) < 3 * found["alpha_sigma"]
    assert found["alpha_sigma"] == pytest.approx((found["alpha"] - 1) / found["tail_values"] ** 0.5)


def test_tail_scan_equals_the_loop():
    x = torch.rand(700, generator=rng(), dtype=torch.float64).add(0.1).reciprocal().sort().values
    best = (math.inf, 0.0, 0)
    for i in range(len(x) - 9):
        tail = x[i:]
        k = len(tail)
        alpha = 1 + k / float((tail / tail[0]).log().sum())
        seen = torch.arange(k, dtype=torch.float64) / k
        best = min(best, (float((1 - (tail / tail[0]) ** (1 - alpha) - seen).abs().max()), alpha, k))
    assert tail_fit(x) == pytest.approx((best[1], best[2]), rel=1e-9)


def test_bad_arguments():
    with pytest.raises(ValueError, match="smallest must be at least 2, got 1"):
        SpectrumTail(smallest=1)
    with pytest.raises(ValueError, match="matrix"):
        singular_values(torch.ones(3))
