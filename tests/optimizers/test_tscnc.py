"""Penalties of sparsity and conditioning: limits, invariances, gradients, and what they do to a matrix."""

import pytest
import torch
from contracts.examples import draw
from torch import Tensor, nn

from rankwise import Optimizer
from rankwise.optimizers import sgd, tscnc
from rankwise.optimizers.tscnc import ConditionGap, TransformedL1

SHAPES = [(5, 9), (9, 5), (4, 4), (1, 3)]


def gap(weight: Tensor, damping: float) -> Tensor:
    """The formula by singular values."""
    squares = torch.linalg.svdvals(weight).square()
    squares = squares + damping * squares.mean()
    return squares.mean().log() - squares.log().mean()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_slope_of_the_gap_is_that_of_singular_values(shape: tuple[int, int]):
    weights = torch.stack([draw(*shape), 100 * draw(*shape, seed=1)]).requires_grad_()
    for damping in (1e-1, 1e-4):
        kind = ConditionGap(weight=1.0, damping=damping)
        wanted = torch.stack([gap(weight, damping) for weight in weights])
        (slope,) = torch.autograd.grad(wanted.sum(), weights)
        torch.testing.assert_close(kind.slope(weights.detach()), slope, rtol=1e-7, atol=1e-9)


def test_the_gap_is_that_of_means_without_damping():
    kind = ConditionGap(weight=1.0, damping=1e-12)
    weight = draw(5, 9)
    turn, other = (torch.linalg.qr(draw(n, n, seed=n)).Q for n in (5, 9))
    (slope,) = kind.slope(weight[None])
    for same, wanted in (
        (-7 * weight, -slope / 7),
        (turn @ weight @ other, turn @ slope @ other),
        (weight.mT, slope.mT),
        (3 * other[:5], torch.zeros(5, 9)),  # all singular values are equal
    ):
        torch.testing.assert_close(kind.slope(same[None])[0], wanted.double(), rtol=1e-8, atol=1e-10)
    bare = 2 * weight / weight.square().sum() - 2 / 5 * torch.linalg.inv(weight @ weight.mT) @ weight
    torch.testing.assert_close(slope, bare, rtol=1e-6, atol=1e-9)


def test_the_slope_of_rows_of_zeros_is_finite():
    weight = draw(5, 9)
    weight[2:] = 0
    kind = ConditionGap(weight=1.0)
    for each in (weight, torch.zeros(5, 9).double()):
        assert bool(kind.slope(each[None]).isfinite().all())
    assert not bool(kind.slope(torch.zeros(1, 5, 9)).any())


def test_the_slope_of_a_nearly_singular_matrix_is_as_exact_as_its_type():
    """One direction holds nearly all: in float32 the products round by more than the damping."""
    torch.manual_seed(0)
    weight = torch.ones(1, 640, 640) + 1e-6 * torch.randn(1, 640, 640)
    kind = ConditionGap(weight=1.0)
    slope = kind.slope(weight)
    assert slope.dtype == torch.float32
    torch.testing.assert_close(slope, kind.slope(weight.double()).float(), rtol=1e-5, atol=0)


def test_transformed_l1_pulls_as_its_formula_says():
    """Where a is large as the sum of sizes does, where it is small not at all."""
    weight = draw(6, 7)
    weight[0] = 0
    many, few = (TransformedL1(weight=1.0, sharpness=a).slope(weight[None])[0] for a in (1e7, 1e-9))
    torch.testing.assert_close(many, weight.sign(), rtol=1e-5, atol=0)
    torch.testing.assert_close(few, torch.zeros_like(weight), rtol=0, atol=1e-4)
    free = draw(6, 7).requires_grad_()
    for a in (0.1, 2.0):
        kind = TransformedL1(weight=1.0, sharpness=a)
        (slope,) = torch.autograd.grad(((a + 1) * free.abs() / (a + free.abs())).sum(), free)
        torch.testing.assert_close(kind.slope(free.detach()[None])[0], slope)
        assert not bool(kind.slope(torch.zeros(1, 2, 2)).any())


def walk(weight: Tensor, transform, lr: float, steps: int) -> Tensor:
    """A weight after steps along nothing but the penalties."""
    param = nn.Parameter(weight.clone())
    optimizer = Optimizer([([param], transform)], lr=lr)
    for _ in range(steps):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    return param.detach()


def condition(weight: Tensor) -> float:
    values = torch.linalg.svdvals(weight)
    return float(values[0] / values[-1])


def test_the_step_is_that_of_the_loss_with_both_penalties():
    weight = draw(5, 9).requires_grad_()
    size = weight.abs()
    loss = 0.3 * (1.5 * size / (0.5 + size)).sum() + 0.7 * gap(weight, 1e-2)
    (slope,) = torch.autograd.grad(loss, weight)
    kind = tscnc(sparsity=0.3, condition=0.7, sharpness=0.5, damping=1e-2, inner=sgd())
    torch.testing.assert_close(walk(weight.detach(), kind, 0.1, 1), weight.detach() - 0.1 * slope)


@pytest.mark.slow
def test_the_gap_alone_makes_a_matrix_well_conditioned():
    u, _, vt = torch.linalg.svd(draw(6, 10), full_matrices=False)
    weight = (u * torch.logspace(0, -3, 6, dtype=torch.float64)) @ vt
    assert condition(weight) == pytest.approx(1000)
    made = walk(weight, tscnc(sparsity=0.0, condition=1.0, inner=sgd()), 0.003, 3000)
    assert condition(made) < 1.1
    assert float(made.norm()) == pytest.approx(float(weight.norm()), rel=0.05)  # steps are across it


def test_pruned_weights_stay_better_conditioned_with_the_gap():
    """Fit a teacher with both penalties, or with sparsity alone, and keep half of the entries."""
    x, found = draw(200, 24), {}
    teacher = draw(16, 24, seed=1) * torch.logspace(0, -2, 16, dtype=torch.float64)[:, None]
    for weight in (0.0, 0.03):
        param = nn.Parameter(0.1 * draw(16, 24, seed=2))
        optimizer = Optimizer([([param], tscnc(sparsity=1e-4, condition=weight))], lr=0.01)
        for _ in range(300):
            optimizer.zero_grad()
            ((x @ (param - teacher).mT).square().mean()).backward()
            optimizer.step()
        kept = param.detach().abs()
        pruned = param.detach() * (kept >= kept.flatten().quantile(0.5))
        values = torch.linalg.svdvals(pruned)
        found[weight] = float(values[0] / values[11])
    assert found[0.03] < 0.6 * found[0.0]
