"""APOLLO: gradients with lengths that Adam gives to a projection."""

import math
from typing import Any

import pytest
import torch
from optimizers.walks import assert_same, draw, gradient, ours, plain_adam, walk
from torch import Tensor, nn

from rankwise import Optimizer
from rankwise.optimizers import adam, apollo, apollo_mini, fira
from rankwise.projectors import Every, LargestRows, RandomOrthogonal


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_it_is_its_formula(shape: tuple[int, int], whole: bool):
    """A plain loop with two rows as the projection."""
    weight, kept, rows, last = draw(*shape, seed=0), [], torch.empty(0), None
    for step in range(10):
        grad = gradient(shape, 0, step)
        grad = grad if shape[0] <= shape[1] else grad.mT
        if step % 4 == 0:
            rows = grad.square().sum(1).topk(2).indices.sort().values
        kept.append(grad[rows])
        direction = plain_adam(kept)
        axes = (0, 1) if whole else 0
        held, expected = grad[rows].norm(dim=axes), grad.norm(dim=axes) * math.sqrt(2 / 6)
        by = direction.norm(dim=axes) / torch.where(held < 0.05 * expected, expected, held)
        move = 0.3 * grad * by
        if last is not None and move.norm() > 1.01 * last:
            move = move * 1.01 * last / move.norm()
        last = move.norm()
        weight = weight - 0.05 * (move if shape[0] <= shape[1] else move.mT)
    kind = apollo(rank=2, every=Every(4, together=True), projector=LargestRows(), scale=0.3, whole=whole)
    (found,) = walk(ours(kind), [shape], 10)
    torch.testing.assert_close(found, weight, rtol=1e-6, atol=1e-6)  # 1e-8 is added to norms


@pytest.mark.parametrize("kind", [apollo(rank=2, every=3), apollo_mini(every=3)], ids=["apollo", "mini"])
def test_columns_keep_the_direction_of_the_gradient(kind: Any):
    (before,), (after,) = (walk(ours(kind), [(6, 9)], steps) for steps in (5, 6))
    step, grad = before - after, gradient((6, 9), 0, 5)
    cosines = torch.nn.functional.cosine_similarity(step, grad, dim=0)
    torch.testing.assert_close(cosines, torch.ones(9).double())
    shares = (step.norm(dim=0) / grad.norm(dim=0)).std()
    assert (float(shares) < 1e-9) == (kind == apollo_mini(every=3))  # one factor, or several
    (one,), (two,) = (walk(ours(adam()), [(6, 9)], steps) for steps in (5, 6))
    assert float(torch.nn.functional.cosine_similarity(one - two, grad, dim=0).min()) < 0.9


def test_small_matrices_and_vectors_get_adam():
    shapes = [(1, 9), (7,), ()]
    assert_same(walk(ours(apollo_mini()), shapes), walk(ours(adam()), shapes), rtol=0, atol=0)


def test_a_random_basis_gives_lengths_of_adam_and_normal_entries_sqrt_of_r_by_s_of_them():
    """Where all rows are alike: the first step of Adam has signs, so columns of the length sqrt(s)."""
    s, r, many = 48, 12, 400
    grad = draw(s, many)
    basis = RandomOrthogonal()
    state = basis.fit(grad[None], basis.init(grad[None], r, torch.tensor([3])), first=True)
    normal = draw(r, s, seed=5) / r**0.5
    for low, wanted in ((basis.down(grad[None], state)[0], s**0.5), (normal @ grad, r**0.5)):
        found = r**0.5 / low.norm(dim=0) * grad.norm(dim=0)
        assert float(found.mean()) == pytest.approx(wanted, rel=0.08)


@pytest.mark.parametrize("kind", [apollo_mini(), apollo(rank=0.25), fira(rank=2)], ids=["mini", "apollo", "fira"])
@pytest.mark.parametrize("grad", [torch.ones(4, 8), torch.eye(8)], ids=["equal rows", "diagonal"])
def test_a_projection_in_which_a_gradient_cancels_makes_no_long_step(kind: Any, grad: Tensor):
    """The place of a parameter is the seed of its projection; some hold nothing of a gradient but rounding."""
    params = [nn.Parameter(torch.zeros_like(grad)) for _ in range(100)]
    optimizer = Optimizer([(params, kind)], lr=1.0)
    for p in params:
        p.grad = grad.clone()
    optimizer.step()
    assert max(float(p.detach().square().mean().sqrt()) for p in params) < 25
