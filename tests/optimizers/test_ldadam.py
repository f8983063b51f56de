"""LDAdam: moments move with the subspace, and nothing is lost."""

from typing import Any

import pytest
import torch
from optimizers.walks import assert_same, draw, gradient, ours, walk
from torch import Tensor, nn

from rankwise import Optimizer
from rankwise.core.seen import wide
from rankwise.core.subspaces import Subspace
from rankwise.optimizers import adam, ldadam
from rankwise.optimizers.adam import Adam
from rankwise.optimizers.ldadam import LowDimensionalAdam
from rankwise.projectors import Every, Rotate, RowBlock, Svd


def fixed(values: Tensor) -> Tensor:
    """Two leading singular vectors whose largest entries are positive."""
    u = torch.linalg.svd(values, full_matrices=False).U[:, :2]
    return u * u.gather(0, u.abs().argmax(0, keepdim=True)).sign()


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_it_is_its_formula(shape: tuple[int, int], feedback: bool):
    """A plain loop in the letters of the paper, with an SVD at each step."""
    b1, b2, rho = 0.7, 0.9, 0.6
    tall = shape[0] > shape[1]
    weight = draw(*shape, seed=0)
    error = torch.zeros(6, 9).double()
    m = v = torch.zeros(2, 9).double()
    basis = torch.zeros(6, 2).double()
    for t in range(1, 9):
        grad = gradient(shape, 0, t - 1)
        grad = (grad.mT if tall else grad) + error
        old, first = basis, t == 1
        basis = fixed(grad if first else rho * old @ m / (1 - b1 ** (t - 1)) + (1 - rho) * grad)
        turn, low = basis.mT @ old, basis.mT @ grad
        if not first:
            hat, moved = m / (1 - b1 ** (t - 1)), turn @ m
            spread = (v / (1 - b2 ** (t - 1)) - hat**2).clamp_min(0)
            v = ((turn**2) @ spread + (turn @ hat) ** 2) * (1 - b2 ** (t - 1))
        else:
            moved = m
        if feedback:
            error = grad - basis @ low + b1 / (1 - b1) * (old @ m - basis @ moved)
        m, v = b1 * moved + (1 - b1) * low, b2 * v + (1 - b2) * low**2
        move = basis @ (m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + 1e-8))
        weight = weight - 0.05 * (move.mT if tall else move)
    kind = ldadam(rank=2, betas=(b1, b2), rho=rho, feedback=feedback, projector=Svd())
    (found,) = walk(ours(kind), [shape], 8)
    torch.testing.assert_close(found, weight, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("feedback", [True, False])
def test_the_mean_in_the_subspace_is_that_of_all_gradients(feedback: bool):
    """The sum of (M_t - b1 M_{t-1}) / (1 - b1), and the last error, are the sum of gradients."""
    kind, b1 = ldadam(rank=2, feedback=feedback), 0.908
    weight = nn.Parameter(draw(6, 9))
    optimizer = Optimizer([([weight], kind)], lr=0.0)
    told, given, before = (torch.zeros(6, 9).double() for _ in range(3))
    for step in range(7):
        weight.grad = gradient((6, 9), 0, step)
        optimizer.step()
        state: Any = optimizer.state[weight]
        mean = state["subspace"]["basis"]["columns"] @ state["inner"]["mean"]
        told, given, before = told + (mean - b1 * before) / (1 - b1), given + weight.grad, mean
    left = state["error"] if feedback else torch.zeros(6, 9).double()
    assert float((told + left - given).norm()) < 1e-12 * float(given.norm()) or not feedback
    assert float((told + left - given).norm()) > 0.1 * float(given.norm()) or feedback


def test_in_the_whole_space_it_is_adam():
    """Betas are equal, so that squares are never below those of means; else they are lifted to these."""
    shapes, betas = [(6, 9), (9, 6)], (0.9, 0.9)
    subspace = Subspace(projector=RowBlock(), rank=6, refresh=Every(1), carry=Rotate())
    kind = wide(LowDimensionalAdam(subspace=subspace, adam=Adam(betas=betas), rho=0.5, feedback=True))
    assert_same(walk(ours(kind), shapes), walk(ours(adam(betas=betas)), shapes), rtol=1e-9, atol=1e-9)


def test_vectors_get_adam_and_rho_is_checked():
    kinds = (ldadam(rank=6), adam(betas=(0.908, 0.99)))
    assert_same(*(walk(ours(kind)) for kind in kinds), rtol=0, atol=0)
    with pytest.raises(ValueError, match="rho"):
        ldadam(rank=2, rho=1.0)
