"""SST: the gradients' rule, what stays still, the draws, and that decomposing anew changes nothing."""

import math
from collections.abc import Callable

import pytest
import torch
from contracts.examples import draw
from torch import Generator, Tensor, nn

import rankwise
from rankwise.adapters import Sst
from rankwise.core.methods import Course
from rankwise.matrices import Base, Dense, Spectral, StructuredMatrix
from rankwise.optimizers import adam
from rankwise.schedules import SampledVectors


def spectral(chosen: list[int]) -> Spectral:
    u, s, vt = torch.linalg.svd(draw(9, 6), full_matrices=False)
    return Spectral(u, s, vt, torch.tensor(chosen))


def gradients(matrix: Spectral, x: Tensor, upstream: Tensor) -> list[Tensor]:
    wanted = [matrix.values, matrix.left_chosen, matrix.right_chosen, x]
    return list(torch.autograd.grad(matrix(x), wanted, upstream))


def test_gradients_of_vectors_leave_the_value_out():
    matrix, x, upstream = spectral([4, 1]), draw(7, 6, seed=1).requires_grad_(), draw(7, 9, seed=2)
    (u, v), slope = matrix.vectors(), upstream.mT @ x.detach()
    values, left, right, dx = gradients(matrix.train(), x, upstream)
    torch.testing.assert_close(values, (u.mT @ slope @ v.mT).diag())
    torch.testing.assert_close(left, slope @ v[[4, 1]].mT)
    torch.testing.assert_close(right, u[:, [4, 1]].mT @ slope)
    torch.testing.assert_close(dx, upstream @ matrix.dense())
    usual = gradients(matrix.eval(), x, upstream)
    torch.testing.assert_close(usual[1], left * matrix.values[[4, 1]])
    torch.testing.assert_close(usual[2], right * matrix.values[[4, 1], None])
    assert not torch.allclose(usual[1], left)  # the control: the rule is no gradient of the loss


def test_a_direction_without_a_value_still_turns():
    matrix = spectral([0])
    with torch.no_grad():
        matrix.values.zero_()
    _, left, right, _ = gradients(matrix.train(), draw(7, 6).requires_grad_(), draw(7, 9, seed=1))
    assert float(left.norm()) > 0
    assert float(right.norm()) > 0


def trained(matrix: nn.Module) -> list[nn.Parameter]:
    return [p for p in matrix.parameters() if p.requires_grad]


Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "torch": lambda params: torch.optim.AdamW(params, lr=0.05, weight_decay=0.1),
    "rankwise": lambda params: rankwise.Optimizer([(params, adam())], lr=0.05, weight_decay=0.1),
}


def begin(
    steps: int, make: Make = OPTIMIZERS["torch"], **fields
) -> tuple[StructuredMatrix, Spectral, torch.optim.Optimizer]:
    matrix = Sst(**fields).attach(Base(Dense(draw(12, 8))), {}, Generator())
    optimizer = make(trained(matrix))
    rankwise.follow(matrix, optimizer, steps=steps)
    return matrix, next(m for m in matrix.modules() if isinstance(m, Spectral)), optimizer


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_only_drawn_vectors_move_and_all_keep_their_lengths(make: Make):
    matrix, inner, optimizer = begin(12, make, rank=3, hold=4, warmup=2)
    x, y = draw(30, 8, seed=1), draw(30, 12, seed=2)
    seen = set()
    for done in range(12):
        chosen = inner.chosen.tolist()
        seen.add(tuple(chosen))
        others = [i for i in range(8) if i not in chosen]
        before = inner.vectors()
        if done % 4 == 0:
            assert inner.left_chosen not in optimizer.state
            assert inner.right_chosen not in optimizer.state
        optimizer.zero_grad()
        (matrix(x) - y).square().mean().backward()
        optimizer.step()
        if (done + 1) % 4:
            assert inner.chosen.tolist() == chosen
            after = inner.vectors()
            assert torch.equal(after[0][:, others], before[0][:, others])
            assert torch.equal(after[1][others], before[1][others])
            assert not (after[0][:, chosen] == before[0][:, chosen]).all(0).any()
        torch.testing.assert_close(inner.vectors()[0].norm(dim=0), torch.ones(8, dtype=torch.float64))
        torch.testing.assert_close(inner.vectors()[1].norm(dim=1), torch.ones(8, dtype=torch.float64))
        assert float(inner.values.detach().min()) >= 0
    assert len(seen) > 1


def test_moments_are_forgotten_by_any_optimiser():
    """Also where states live in stacks: left and right vectors of a square matrix have one shape each layer."""
    runs = []
    for make in OPTIMIZERS.values():
        matrices = nn.ModuleList(
            Sst(rank=3, hold=3).attach(Base(Dense(draw(8, 8))), {}, Generator()) for _ in "ab"
        )
        optimizer = make(trained(matrices))
        rankwise.follow(matrices, optimizer, steps=9)
        for _ in range(9):
            optimizer.zero_grad()
            sum(
                (matrix(draw(30, 8, seed=1)) - draw(30, 8, seed=2)).square().mean() for matrix in matrices
            ).backward()
            optimizer.step()
        runs.append([matrix.dense().detach() for matrix in matrices])
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_optimiser_keeps_numbers_for_the_drawn_pairs_alone(make: Make):
    matrix, _, optimizer = begin(3, make, rank=2, hold=10)
    matrix(draw(5, 8)).square().sum().backward()
    optimizer.step()
    numbers = sum(
        t.numel() for s in optimizer.state.values() for t in s.values() if t.is_floating_point() and t.dim()
    )
    assert numbers == 2 * (2 * (12 + 8) + 8)


def test_a_new_decomposition_changes_nothing():
    schedule, matrix = SampledVectors(hold=2), spectral([0, 1])
    with torch.no_grad():  # turned, no longer orthonormal
        matrix.put(*(v + 0.1 * draw(*v.shape, seed=8) for v in matrix.vectors()), torch.tensor([1, 5]))
    before = matrix.dense().detach()
    optimizer = torch.optim.Adam(matrix.parameters())
    for p in matrix.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    course = Course(schedule, {"a": matrix}, optimizer, 100, done=4, state={"a": {"drawn": torch.tensor(2)}})
    schedule.settle(course)  # 4 is in the middle of a round of 3 draws
    assert matrix.values in optimizer.state
    torch.testing.assert_close(matrix.dense().detach(), before)
    course.done = 6
    schedule.settle(course)
    torch.testing.assert_close(matrix.dense().detach(), before)
    left, right = matrix.vectors()
    for vectors in (left.mT, right):
        torch.testing.assert_close(vectors @ vectors.mT, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(matrix.values.detach(), torch.linalg.svdvals(before)[:6])
    assert not any(p in optimizer.state for p in matrix.parameters())


def test_draws_are_as_likely_as_they_should_be():
    schedule, matrix, count = SampledVectors(hold=1), spectral([0]), 3000
    seen = torch.zeros(6)
    course = Course(schedule, {"a": matrix}, torch.optim.SGD(matrix.parameters(), lr=0.1), count)
    values = matrix.values.detach().clone()
    for done in range(1, 6 * count):
        if done % 6:  # no decomposition
            course.done = done
            schedule.settle(course)
            seen[matrix.chosen.long()] += 1
            if done > count:
                break
    wanted, total = (1 / 6 + values / values.sum()) / 2, float(seen.sum())
    spread = (total * wanted * (1 - wanted)).sqrt()
    assert ((seen - total * wanted).abs() < 4 * spread).all()


def test_a_small_share_of_vectors_goes_further_than_values_alone():
    weight, teacher = draw(12, 8), draw(12, 8, seed=3)
    x = draw(64, 8, seed=4)
    losses = {}
    for lr in (0.0, 0.05):
        matrix = Sst(rank=2, hold=5, warmup=1).attach(Base(Dense(weight)), {}, Generator())
        inner = next(m for m in matrix.modules() if isinstance(m, Spectral))
        vectors = {"params": [inner.left_chosen, inner.right_chosen], "lr": lr}
        optimizer = torch.optim.Adam([{"params": [inner.values], "lr": 0.05}, vectors])
        rankwise.follow(matrix, optimizer, steps=300)
        for _ in range(300):
            optimizer.zero_grad()
            loss = (matrix(x) - x @ teacher.mT).square().mean()
            loss.backward()
            optimizer.step()
        losses[lr] = float(loss.detach())
    assert losses[0.05] < 0.2 * losses[0.0]
    assert math.isfinite(losses[0.0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"rank": 4, "components": 3}, "components"), ({"hold": 0}, "hold"), ({"warmup": -1}, "warmup")],
)
def test_bad_fields(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Sst(**fields)


def test_chosen_pairs_that_are_damaged_are_refused():
    matrix = spectral([1, 2])
    matrix.chosen[0] = 2
    with pytest.raises(ValueError, match="damaged"):
        matrix.check()
