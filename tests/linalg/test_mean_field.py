"""Mean-field theory: moments that are known, and what wide random networks do."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rankwise.linalg import critical_variances, gradient_gain, preactivation_variance
from rankwise.linalg.mean_field import Function


def erf(x: Tensor) -> Tensor:
    """Its moments under a normal law have closed forms."""
    return torch.erf(x)


def dense(function: Function, q: float) -> float:
    """E[f(sqrt(q) z)^2] by a sum over so many points that it needs no thought."""
    z = torch.linspace(-12, 12, 1_000_000, dtype=torch.float64)
    weights = (-z.square() / 2).exp()
    return float((weights * function(q**0.5 * z).square()).sum() / weights.sum())


def steep(x: Tensor) -> Tensor:
    """The derivative of tanh."""
    return x.cosh().reciprocal().square()


@pytest.mark.parametrize("power", range(6))
def test_powers_have_the_moments_of_a_normal_law(power: int):
    wanted = math.prod(range(2 * power - 1, 0, -2))  # E[z^2p]
    found = gradient_gain(lambda x: x ** (power + 1) / (power + 1), 1.0, 1.0)
    assert found == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("q", [1e-4, 0.5, 9.0, 400.0, 1e5])
def test_gains_are_right_where_a_function_is_steep_or_has_corners(q: float):
    """E[hardtanh'(sqrt(q) z)^2] is the share of inputs between -1 and 1."""
    assert gradient_gain(torch.tanh, 1.0, q) == pytest.approx(dense(steep, q), rel=1e-9)
    share = math.erf(1 / math.sqrt(2 * q))
    assert gradient_gain(functional.hardtanh, 1.0, q) == pytest.approx(share, rel=2e-4)


@pytest.mark.parametrize("weight", [4.0, 64.0, 400.0])
def test_chaotic_networks_have_the_variance_and_gain_of_dense_sums(weight: float):
    q = preactivation_variance(torch.tanh, weight, 0.0)
    assert q == pytest.approx(weight * dense(torch.tanh, q), rel=1e-9)
    assert gradient_gain(torch.tanh, weight, q) == pytest.approx(weight * dense(steep, q), rel=1e-9)


def test_modules_may_be_given_whatever_their_type():
    module = nn.PReLU()  # float32
    assert gradient_gain(module, 1.0, 1.0) == pytest.approx((1 + 0.25**2) / 2)
    assert critical_variances(module, 1.0) == pytest.approx((2 / (1 + 0.25**2), 0), abs=1e-12)
    assert module.weight.dtype == torch.float32
    assert module.weight.grad is None


@pytest.mark.parametrize("q", [0.02, 0.5, 1.5])
def test_moments_of_erf_are_those_of_williams(q: float):
    """E[erf(u)^2] = (2 / pi) asin(2 q / (1 + 2 q)), and E[erf'(u)^2] = (4 / pi) / sqrt(1 + 4 q)."""
    weight, bias = critical_variances(erf, q)
    assert weight == pytest.approx(math.pi / 4 * math.sqrt(1 + 4 * q), rel=1e-7)
    assert bias == pytest.approx(q - weight * 2 / math.pi * math.asin(2 * q / (1 + 2 * q)), rel=1e-5, abs=1e-9)
    assert gradient_gain(erf, weight, q) == pytest.approx(1)


def test_critical_points_that_are_known():
    assert critical_variances(torch.relu, 0.7) == pytest.approx((2, 0), abs=1e-12)  # He et al.
    assert critical_variances(lambda x: x, 0.7) == pytest.approx((1, 0), abs=1e-12)
    weight, bias = critical_variances(torch.tanh, 0.026)
    assert (weight, bias) == pytest.approx((1.05, 2e-5), rel=0.2)  # as published for tanh
    small, tiny = critical_variances(torch.tanh, 1e-4)
    assert small - 1 == pytest.approx(2e-4, rel=1e-3)  # tanh'^2 = 1 - 2 x^2 + ...
    assert 0 < tiny < 1e-10


@pytest.mark.parametrize("q", [1 / 64, 0.3])
def test_the_fixed_point_is_where_the_critical_variances_keep_it(q: float):
    weight, bias = critical_variances(torch.tanh, q)
    for start in (q / 2, 3 * q):
        assert preactivation_variance(torch.tanh, weight, bias, start=start) == pytest.approx(q, rel=1e-6)
    below = preactivation_variance(torch.tanh, 0.8 * weight, bias)
    assert gradient_gain(torch.tanh, 0.8 * weight, below) < 1
    above = preactivation_variance(torch.tanh, 1.5 * weight, bias)
    assert gradient_gain(torch.tanh, 1.5 * weight, above) > 1


@pytest.mark.parametrize(("weight", "bias"), [(1.05, 2e-5), (1.6, 0.05)])
def test_wide_networks_do_as_predicted(weight: float, bias: float):
    """Width 1000, after some layers: variance, and mean squared singular value of a layer, within 5 percent."""
    width, q = 1000, preactivation_variance(torch.tanh, weight, bias)
    generator = torch.Generator().manual_seed(0)
    x = math.sqrt(q) * torch.randn(width, generator=generator)
    variances, gains = [], []
    for _ in range(4):
        matrix = math.sqrt(weight / width) * torch.randn(width, width, generator=generator)
        shift = math.sqrt(bias) * torch.randn(width, generator=generator)
        h = matrix @ torch.tanh(x) + shift
        slope = 1 - torch.tanh(h).square()
        variances.append(float(h.var()))
        gains.append(float((slope[:, None] * matrix).square().sum()) / width)  # |D W|^2 / N
        x = h
    assert sum(variances) / 4 == pytest.approx(q, rel=0.05)
    assert sum(gains) / 4 == pytest.approx(gradient_gain(torch.tanh, weight, q), rel=0.05)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="variances must be finite numbers >= 0"):
        preactivation_variance(torch.tanh, -1.0, 0.0)
    with pytest.raises(ValueError, match="does not settle"):
        preactivation_variance(torch.relu, 2.5, 0.1)
    with pytest.raises(ValueError, match="variance must be a finite number > 0"):
        critical_variances(torch.tanh, 0.0)
    with pytest.raises(ValueError, match="no critical point"):
        critical_variances(lambda x: x + 1, 0.5)
    with pytest.raises(ValueError, match="constant"):
        critical_variances(lambda x: 0 * x, 0.5)
