"""Fira: GaLore, and the rest of the gradient as long as Adam makes what is inside."""

import pytest
import torch
from optimizers.walks import CLOSE, assert_same, draw, gradient, inside, ours, plain_adam, walk

from rankwise.core.seen import wide
from rankwise.core.transforms import Transform
from rankwise.optimizers import adam, fira, galore
from rankwise.optimizers.fira import LikeInside
from rankwise.optimizers.gains import GrowthLimit
from rankwise.optimizers.project import Project
from rankwise.projectors import Every, RowBlock, Svd


@pytest.mark.parametrize("removes", [1.0, 0.25])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_it_is_its_formula(shape: tuple[int, int], removes: float):
    """A plain loop, column by column; with ``removes`` of the scale it is that of the published code."""
    weight, kept, last = draw(*shape, seed=0), [], None
    basis = torch.empty(0)
    for step in range(11):
        grad = gradient(shape, 0, step)
        grad = grad if shape[0] <= shape[1] else grad.mT
        if step % 4 == 0:
            u = torch.linalg.svd(grad, full_matrices=False).U[:, :2]
            basis = u * u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
        low = basis.mT @ grad
        kept.append(low)
        direction = plain_adam(kept)
        rest = grad - removes * basis @ low
        for j in range(rest.shape[1]):
            held, expected = low[:, j].norm(), grad[:, j].norm() * (2 / 6) ** 0.5
            rest[:, j] *= direction[:, j].norm() / (expected if held < 0.05 * expected else held)
        if last is not None and rest.norm() > 1.01 * last:
            rest = rest * 1.01 * last / rest.norm()
        last = rest.norm()
        move = 0.25 * basis @ direction + rest
        weight = weight - 0.05 * (move if shape[0] <= shape[1] else move.mT)
    kind = fira(rank=2, every=Every(4, together=True), projector=Svd(), removes=removes)
    (found,) = walk(ours(kind), [shape], 11)
    torch.testing.assert_close(found, weight, rtol=1e-6, atol=1e-6)  # 1e-8 is added to norms


def test_with_full_rank_it_is_adam():
    shapes = [(6, 9), (9, 6), (7,)]
    assert_same(walk(ours(fira(rank=1.0)), shapes), walk(ours(adam()), shapes), rtol=0, atol=0)
    galore_like = inside(RowBlock(), adam(), 6).inner  # type: ignore[attr-defined]
    rest = LikeInside(limit=GrowthLimit())
    whole = wide(Project(subspace=galore_like.subspace, inner=adam(), rest=rest))
    assert_same(walk(ours(whole), shapes[:2]), walk(ours(adam()), shapes[:2]))


def moves(transform: Transform, steps: int) -> torch.Tensor:
    (after,) = walk(ours(transform, lr=1.0), [(12, 15)], steps)
    (before,) = walk(ours(transform, lr=1.0), [(12, 15)], steps - 1)
    return after - before


def test_what_it_adds_to_galore_lies_outside_of_the_subspace():
    options = {"rank": 3, "every": Every(3, together=True), "projector": Svd(), "scale": 1.0}
    for steps in (1, 2, 5):
        inner, whole = (moves(kind(**options), steps) for kind in (galore, fira))
        torch.testing.assert_close(inner.mT @ (whole - inner), torch.zeros(15, 15).double(), rtol=0, atol=1e-8)
        assert int(torch.linalg.matrix_rank(whole, rtol=1e-6)) == 12
    mixed = moves(fira(**options, removes=0.25), 2)
    assert float((inner.mT @ (mixed - inner)).norm()) > 1e-3  # not so where the rest keeps a part


def test_norms_grow_slowly_and_shrink_at_once():
    limit, last = GrowthLimit(factor=1.5), None
    state = limit.init(draw(2, 3, 4), torch.arange(2))
    for size in (1.0, 10.0, 10.0, 0.0, 10.0, 0.1, 0.1):
        grad = size * draw(2, 3, 4, seed=int(10 * size))
        norm = limit.update(grad, state, grad).flatten(1).norm(dim=1)
        wanted = grad.flatten(1).norm(dim=1)
        if last is not None and size:
            wanted = torch.minimum(wanted, 1.5 * last)
        torch.testing.assert_close(norm, wanted, **CLOSE)
        last = norm if size else last
    with pytest.raises(ValueError, match="at least 1"):
        fira(rank=2, growth=0.5)
    with pytest.raises(ValueError, match="removes"):
        fira(rank=2, removes=1.5)
