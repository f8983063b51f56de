"""Reflections are orthogonal by construction, and reach what they should."""

import pytest
import torch
from contracts.examples import draw
from torch import Generator, Tensor

from rankwise.adapters import Householder
from rankwise.matrices import Base, Dense, Reflections


def one_by_one(vectors: Tensor) -> Tensor:
    made = torch.eye(vectors.shape[1], dtype=vectors.dtype)
    for v in vectors:
        made = made - 2 * torch.outer(made @ v, v) / v.dot(v)
    return made


def away_from_one(matrix: Tensor) -> float:
    return float((matrix.detach().mT @ matrix.detach() - torch.eye(len(matrix), dtype=matrix.dtype)).abs().max())


@pytest.mark.parametrize("count", [1, 2, 5, 24])
def test_the_triangular_form_is_the_product_in_sequence(count: int):
    vectors = draw(count, 12)
    torch.testing.assert_close(Reflections(vectors).dense(), one_by_one(vectors), rtol=0, atol=1e-12)
    low = Reflections(vectors.float()).dense().double()
    torch.testing.assert_close(low, one_by_one(vectors), rtol=0, atol=5e-6)


def test_it_is_what_lapack_makes_of_the_same_vectors():
    vectors = draw(4, 10).triu(1)
    vectors[:, :4] += torch.eye(4, dtype=torch.float64)
    scales = 2 / vectors.square().sum(1)
    columns = torch.linalg.householder_product(vectors.mT.contiguous(), scales)
    torch.testing.assert_close(Reflections(vectors).dense()[:, :4], columns)


def test_gradients_are_exact():
    x, vectors = draw(2, 5, seed=1), draw(3, 5).requires_grad_()

    def through(v: Tensor, of: str) -> Tensor:
        matrix = Reflections(v.detach())
        return torch.func.functional_call(_Call(matrix, of), {"matrix.vectors": v}, (x,))

    for of in ("forward", "adjoint", "dense"):
        assert torch.autograd.gradcheck(lambda v, of=of: through(v, of), (vectors,))


class _Call(torch.nn.Module):
    def __init__(self, matrix: Reflections, of: str) -> None:
        super().__init__()
        self.matrix, self.of = matrix, of

    def forward(self, x: Tensor) -> Tensor:
        return self.matrix.dense() if self.of == "dense" else getattr(self.matrix, self.of)(x)


def test_the_adjoint_is_the_inverse():
    matrix, x = Reflections(draw(4, 9)), draw(3, 9, seed=1)
    torch.testing.assert_close(matrix.adjoint(matrix(x)), x)


def test_a_vector_of_zeros_reflects_nothing():
    vectors = draw(3, 5)
    vectors[1] = 0
    matrix = Reflections(vectors)
    torch.testing.assert_close(matrix.dense(), one_by_one(vectors[[0, 2]]))
    matrix(draw(2, 5)).sum().backward()
    assert matrix.vectors.grad is not None
    assert bool(matrix.vectors.grad.isfinite().all())


@pytest.mark.slow
def test_a_thousand_steps_of_adam_do_not_leave_the_orthogonal_matrices():
    """A rotation near the identity is learned, in float32, and lengths of rows stay those of the weight."""
    n = 32
    skew = draw(n, n, dtype=torch.float32)
    target = torch.linalg.matrix_exp(0.1 * (skew - skew.mT))
    weight = draw(n, n, seed=1, dtype=torch.float32)
    adapted = Householder(rank=n).attach(Base(Dense(weight)), {}, Generator().manual_seed(0))
    (vectors,) = (p for p in adapted.parameters() if p.requires_grad)
    optimizer = torch.optim.Adam([vectors], lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    losses = []
    for _ in range(1000):
        optimizer.zero_grad()
        loss = (adapted.dense() - weight @ target).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    turned = Reflections(vectors.detach()).dense()
    assert away_from_one(turned) < 5e-6
    assert losses[-1] < 1e-3 * losses[0]
    torch.testing.assert_close(adapted.dense().norm(dim=1), weight.norm(dim=1), rtol=1e-5, atol=0)


def test_a_procrustes_problem_of_64_dimensions_is_solved():
    """The rotation that turns one set of rows into another, far from the identity."""
    rows, target = draw(128, 64), torch.linalg.qr(draw(64, 64, seed=2))[0]
    target[:, 0] *= torch.linalg.det(target).sign()  # an even number of reflections is a rotation
    turned = rows @ target
    adapted = Householder(rank=64).attach(Base(Dense(rows)), {}, Generator().manual_seed(0)).double()
    (vectors,) = (p for p in adapted.parameters() if p.requires_grad)
    optimizer = torch.optim.LBFGS([vectors], max_iter=150, line_search_fn="strong_wolfe", tolerance_change=0)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (adapted.dense() - turned).square().mean()
        value.backward()
        return value.detach()

    optimizer.step(loss)
    left = Reflections(vectors.detach()).dense().detach() - target
    assert float(left.norm() / target.norm()) < 1e-3


def test_a_free_factor_leaves_them_at_once():
    """The same bound is no property of the optimiser: a plain matrix breaks it in one step."""
    free = torch.eye(8).requires_grad_()
    (free - draw(8, 8, dtype=torch.float32)).square().sum().backward()
    torch.optim.Adam([free], lr=0.03).step()
    assert away_from_one(free.detach()) > 1e-2


def test_orthogonal_to_rounding_when_wide():
    unit = Reflections(draw(64, 512, dtype=torch.float32)).dense()
    assert away_from_one(unit) < 5e-6


@pytest.mark.parametrize("rank", [0, 3, -2, 2.0, True])
def test_ranks_that_are_no_pairs_are_refused(rank):
    with pytest.raises(ValueError, match="even and >= 2"):
        Householder(rank=rank)


def test_more_reflections_than_inputs_are_refused():
    with pytest.raises(ValueError, match="lower rank"):
        Householder(rank=6).attach(Base(Dense(draw(8, 4))), {}, Generator())


def test_autocast_does_not_reach_the_triangle():
    matrix = Reflections(draw(6, 40, dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, inner = matrix.factors()
    assert torch.equal(inner, matrix.factors()[1])


@pytest.mark.parametrize("length", [1e-30, 1e-13, 1e20, 1e30])
def test_lengths_do_not_matter(length: float):
    vectors = draw(3, 8)
    wanted = one_by_one(vectors)
    found = Reflections((length * vectors).float()).dense()
    torch.testing.assert_close(found.detach().double(), wanted, rtol=0, atol=2e-6)
