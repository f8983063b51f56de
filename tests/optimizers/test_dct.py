"""DCT-AdamW, Trion and error feedback: a fixed basis, of which parts are chosen at each step."""

from typing import Any

import pytest
import torch
from optimizers.walks import CLOSE, assert_same, draw, gradient, inside, ours, walk
from torch import Tensor, nn

from rankwise import Optimizer
from rankwise.core.combining import chain
from rankwise.core.seen import wide
from rankwise.core.subspaces import Subspace
from rankwise.linalg import MUON, POLAR_EXPRESS
from rankwise.optimizers import adam, dct_adamw, galore, muon, project, sgd, trion
from rankwise.optimizers.aspect import Aspect
from rankwise.optimizers.feedback import Feedback
from rankwise.optimizers.muon import Orthogonalize
from rankwise.optimizers.trion import SpentMomentum
from rankwise.projectors import Cosine, Every, Keep, RowBlock, WarmPower


def cosines(size: int) -> Tensor:
    """The orthogonal matrix of the second cosine transform, from its definition."""
    i, j = torch.meshgrid(torch.arange(size).double(), torch.arange(size).double(), indexing="ij")
    rows = (2 / size) ** 0.5 * torch.cos(i * (2 * j + 1) * torch.pi / (2 * size))
    return torch.cat([rows[:1] / 2**0.5, rows[1:]])


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_dct_adamw_is_its_formula(shape: tuple[int, int], feedback: bool):
    """A plain loop with moments of all frequencies, of which those that are not chosen are set to zero."""
    b1, b2 = 0.8, 0.9
    q, weight, error = cosines(6), draw(*shape, seed=0), torch.zeros(6, 9).double()
    m = v = torch.zeros(6, 9).double()
    for t in range(1, 10):
        grad = gradient(shape, 0, t - 1)
        found = q @ ((grad if shape[0] <= shape[1] else grad.mT) + error)
        chosen = torch.zeros(6, 1).double()
        chosen[found.square().sum(1).topk(3).indices] = 1
        if t > 1:  # carried squares are at least those of the mean
            v = torch.maximum(v / (1 - b2 ** (t - 1)), (m / (1 - b1 ** (t - 1))) ** 2) * (1 - b2 ** (t - 1))
        m = b1 * m * chosen + (1 - b1) * found * chosen
        v = b2 * v * chosen + (1 - b2) * (found * chosen) ** 2
        error = q.mT @ (found * (1 - chosen)) * float(feedback)
        move = q.mT @ (m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + 1e-8))
        weight = weight - 0.05 * (move if shape[0] <= shape[1] else move.mT)
    (found,) = walk(ours(dct_adamw(rank=3, betas=(b1, b2), feedback=feedback)), [shape], 9)
    torch.testing.assert_close(found, weight, rtol=1e-6, atol=1e-6)


def test_dct_adamw_is_a_projection_and_at_the_end_adam():
    one = project(Cosine(), adam(), rank=2, every=3, carry=Keep())
    assert_same(walk(ours(one)), walk(ours(dct_adamw(rank=2, every=3, carry=Keep()))), rtol=0, atol=0)
    assert_same(walk(ours(dct_adamw(rank=1.0, feedback=True))), walk(ours(adam())), rtol=0, atol=0)
    assert dct_adamw(rank=4, every=200, projector=WarmPower(), carry=Keep()) == galore(rank=4, scale=1.0)


@pytest.mark.parametrize("rest", [Feedback(), None])
def test_with_feedback_no_gradient_is_lost(rest: Any):
    """What sgd has stepped and what waits are the sum of all gradients."""
    weight = nn.Parameter(torch.zeros(6, 9).double())
    optimizer = Optimizer([([weight], project(Cosine(), sgd(), rank=2, every=1, rest=rest))], lr=1.0)
    total = torch.zeros(6, 9).double()
    for step in range(8):
        weight.grad = gradient((6, 9), 0, step)
        total += weight.grad
        optimizer.step()
    waits: Any = optimizer.state[weight]["rest"]["error"] if rest else torch.zeros(6, 9).double()
    missing = float((waits - weight.detach() - total).norm()) / float(total.norm())
    assert (missing < 1e-14) if rest else (missing > 0.2)


def test_frequencies_that_stay_keep_their_moments():
    kind = inside(Cosine(), adam(betas=(0.9, 0.9)), 2, refresh=Every(1))
    for carry, stays in ((dct_adamw(rank=2).matrix.inner.subspace.carry, True), (Keep(), False)):  # type: ignore[attr-defined]
        kind = inside(Cosine(), adam(betas=(0.9, 0.9)), 2, refresh=Every(1), carry=carry)
        weight = nn.Parameter(torch.zeros(6, 9).double())
        optimizer = ours(kind)([weight])
        sizes = ((3.0, 0.0, 2.0, 1.0, 0.0, 0.0), (0.0, 0.0, 2.0, 3.0, 0.0, 0.0))  # 0 and 2, then 2 and 3
        means = []
        for step, size in enumerate(sizes):
            weight.grad = cosines(6).mT @ torch.diag(torch.tensor(size).double()) @ gradient((6, 9), 0, step)
            optimizer.step()
            state: Any = optimizer.state[weight]
            means.append((cosines(6) @ weight.grad, state["inner"]["mean"].clone()))
        kept = 0.9 * means[0][1][1] + 0.1 * means[1][0][2]
        assert torch.allclose(means[1][1][0], kept, atol=1e-12) == stays
        fresh = 0.1 * means[1][0][3]
        assert torch.allclose(means[1][1][1], fresh, atol=1e-12) == stays


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_trion_is_its_formula(shape: tuple[int, int]):
    """A plain loop with polar factors by an SVD."""
    q, weight, momentum = cosines(6), draw(*shape, seed=0), torch.zeros(6, 9).double()
    for step in range(7):
        grad = gradient(shape, 0, step)
        momentum = momentum + (grad if shape[0] <= shape[1] else grad.mT)
        found = q @ momentum
        rows = found.square().sum(1).topk(3).indices
        low, back = found[rows], q[rows].mT
        momentum = momentum - 0.1 * back @ low
        u, _, vt = torch.linalg.svd(low, full_matrices=False)
        move = back @ u @ vt
        weight = weight - 0.05 * max(1, shape[0] / shape[1]) ** 0.5 * (move if shape[0] <= shape[1] else move.mT)
    (found,) = walk(ours(trion(rank=3, beta=0.9, polynomials=POLAR_EXPRESS)), [shape], 7)
    torch.testing.assert_close(found, weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("projector", [Cosine(), RowBlock()])
def test_trion_in_the_whole_space_is_muon(projector: Any):
    shapes = [(6, 9), (9, 6)]
    subspace = Subspace(projector=projector, rank=6, refresh=Every(1), carry=Keep())
    spent = SpentMomentum(subspace=subspace, inner=Orthogonalize(polynomials=(MUON,) * 5), beta=0.9)
    whole = walk(ours(chain(wide(spent), Aspect())), shapes)
    # a norm of a sum and of a mean, to both of which 1e-7 is added
    assert_same(whole, walk(ours(muon(beta=0.9, nesterov=False)), shapes), rtol=1e-5, atol=1e-6)
    assert_same(walk(ours(trion(rank=1.0))), walk(ours(muon(nesterov=False))), **CLOSE)


def test_bad_fields_are_refused():
    with pytest.raises(ValueError, match="beta"):
        trion(rank=2, beta=1.0)
