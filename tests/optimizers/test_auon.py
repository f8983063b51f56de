"""AuON, and what it is but for a number that is one."""

from typing import Any

import pytest
import torch
from optimizers.walks import assert_same, draw, gradient, ours, walk

from rankwise.core.combining import by_shape
from rankwise.core.transforms import Transform
from rankwise.optimizers import adam, auon, hybrid_auon, muon, sgd
from rankwise.optimizers.auon import HyperbolicScale
from rankwise.optimizers.gains import GrowthLimit

SHAPES = [(40, 60), (60, 40)]


def momenta(shape: Any, steps: int):
    """The momentum and its look ahead at each step."""
    mean = torch.zeros(shape).double()
    for step in range(steps):
        grad = gradient(shape, 0, step)
        mean = 0.95 * mean + 0.05 * grad
        yield 0.05 * grad + 0.95 * mean


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_it_is_its_formula(shape: tuple[int, int], released: bool):
    weight = draw(*shape, seed=0)
    for ahead in momenta(shape, 9):
        unit = ahead / (ahead.norm() + 1e-7)
        r = ((1.5 * unit).cosh() ** 2).mean() ** 0.5
        tall = max(1, shape[0] / shape[1]) ** 0.5
        weight = weight - 0.05 * (ahead / r if released else tall * unit / r)
    (found,) = walk(ours(auon(gamma=1.5, released=released)), [shape], 9)
    torch.testing.assert_close(found, weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [HyperbolicScale(), GrowthLimit()], ids=["auon", "growth"])
@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 4, 5)], ids=str)
def test_norms_of_a_stack_are_those_of_each_parameter(kind: Transform, shape: tuple[int, ...]):
    values = draw(*shape)
    states = [kind.init(part, torch.arange(len(part))) for part in (values, *values.split(1))]
    for factor in (1.0, 5.0, 3.0):
        together, *alone = (
            kind.update(factor * part, state, part)
            for part, state in zip((values, *values.split(1)), states, strict=True)
        )
        torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("gamma", [1.0, 1.5])
def test_the_number_is_one(gamma: float):
    for values in (draw(1, 100, 120), torch.zeros(1, 100, 120).double().index_fill_(1, torch.tensor([3]), 1)):
        norm = values.norm()
        r = norm / HyperbolicScale(gamma=gamma).update(values, {}, values).norm() / norm
        entries = values.numel()
        assert 1 - 1e-6 <= float(r) <= (1 + torch.tensor(gamma).sinh().item() ** 2 / entries) ** 0.5
        assert abs(float(r) - 1 - gamma**2 / (2 * entries)) < 1e-7 + 1e-2 * gamma**2 / entries


def test_it_is_normalised_sgd():
    """Singular vectors and the ratios of singular values are those of the momentum."""
    before = [draw(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    one, two = (walk(ours(auon()), SHAPES, steps) for steps in (20, 21))
    for i, shape in enumerate(SHAPES):
        mean = torch.zeros(shape).double()
        for step in range(21):
            grad = gradient(shape, i, step)
            mean = 0.95 * mean + 0.05 * grad
        ahead = 0.05 * grad + 0.95 * mean
        wanted = 0.05 * max(1, shape[0] / shape[1]) ** 0.5 * ahead / ahead.norm()
        torch.testing.assert_close(one[i] - two[i], wanted, rtol=1e-3, atol=1e-9)
        assert float((two[i] - before[i]).norm()) > 0.5
    values = torch.linalg.svdvals(one[0] - two[0])
    assert float(values.max() / values.min()) > 5  # not orthogonalised at all


def test_as_released_it_is_sgd_and_follows_the_scale_of_gradients():
    rate = ours(auon(released=True))
    mean = lambda params: torch.optim.SGD(params, lr=0.05 * 0.05, momentum=0.95, nesterov=True)  # noqa: E731
    assert_same(walk(rate, SHAPES), walk(mean, SHAPES), rtol=1e-3, atol=1e-4)
    assert_same(walk(ours(auon(released=True, gamma=0.0)), SHAPES), walk(mean, SHAPES), rtol=1e-10, atol=1e-10)
    for released in (False, True):
        ends = []
        for scale in (1.0, 10.0):
            kind = auon(released=released)
            weight = torch.nn.Parameter(draw(6, 9))
            optimizer = ours(kind)([weight])
            for step in range(5):
                weight.grad = scale * gradient((6, 9), 0, step)
                optimizer.step()
            ends.append(weight.detach())
        assert torch.allclose(*ends, atol=1e-6) == (not released)


def test_the_hybrid_is_muon_but_for_the_shape():
    (before,), (one,) = [draw(40, 60, seed=0)], walk(ours(hybrid_auon()), [(40, 60)], 10)
    (two,) = walk(ours(muon()), [(40, 60)], 10)
    assert float((one - two).norm()) < 0.02 * float((two - before).norm())
    zero = walk(ours(hybrid_auon(gamma=0.0)), [(40, 60)], 10)
    assert_same(zero, [two], rtol=1e-6, atol=1e-6)
    (tall, muons) = (
        walk(ours(kind, lr=1.0), [(60, 40)], 1)[0] - draw(60, 40) for kind in (hybrid_auon(gamma=0.0), muon())
    )
    torch.testing.assert_close(muons, 1.5**0.5 * tall, rtol=1e-6, atol=1e-6)


def test_vectors_get_the_other():
    kind = by_shape(matrix=sgd(), other=adam(betas=(0.8, 0.95)))
    assert_same(walk(ours(auon()), [(7,), ()]), walk(ours(kind), [(7,), ()]), rtol=0, atol=0)
    with pytest.raises(ValueError, match="gamma"):
        auon(gamma=-1.0)
