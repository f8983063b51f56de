"""ARO: steps in a frame that turns with them."""

from typing import Any

import pytest
import torch
from optimizers.walks import assert_same, draw, gradient, ours, walk
from torch import Tensor, nn

from rankwise import Optimizer
from rankwise.core.seen import wide
from rankwise.optimizers import adam, aro, sgd, sign
from rankwise.optimizers.aro import SHIFT, Balance, TurningFrame


def gram_schmidt(values: Tensor) -> Tensor:
    """Orthonormal columns, each on the side of what it is made of."""
    columns: list[Tensor] = []
    for column in values.mT:
        for other in columns * 2:
            column = column - other * (other @ column)
        columns.append(column / column.norm())
    return torch.stack(columns, dim=1)


def balanced(values: Tensor) -> Tensor:
    for _ in range(5):
        values = values / (values.norm(dim=1, keepdim=True) / values.shape[1] ** 0.5)
        values = values / (values.norm(dim=0, keepdim=True) / values.shape[0] ** 0.5)
    return values


@pytest.mark.parametrize(("base", "function"), [(Balance(), balanced), (sign(), torch.sign)])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_it_is_its_formula(shape: tuple[int, int], base: Any, function: Any):
    weight, mean, frame = draw(*shape, seed=0), torch.zeros(6, 9).double(), torch.eye(6).double()
    for step in range(7):
        grad = gradient(shape, 0, step)
        mean = 0.8 * mean + 0.2 * (grad if shape[0] <= shape[1] else grad.mT)
        cross = mean @ function(frame.mT @ mean).mT
        frame = gram_schmidt(cross / cross.norm() + SHIFT * frame)
        move = 0.2 * frame @ function(frame.mT @ mean)
        weight = weight - 0.05 * (move if shape[0] <= shape[1] else move.mT)
    (found,) = walk(ours(aro(beta=0.8, base=base)), [shape], 7)
    torch.testing.assert_close(found, weight, rtol=1e-8, atol=1e-8)


def frames(base: Any, values: Tensor, steps: int, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The frame and the step after some steps on one matrix."""
    kind = TurningFrame(base=base)
    state = kind.init(values[None], torch.tensor([0]))
    if start is not None:
        state["frame"].copy_(start)
    step = torch.zeros(0)
    for _ in range(steps):
        step = kind.update(values[None], state, values[None])[0]
    return state["frame"][0], step


def test_with_the_identity_the_frame_finds_singular_vectors_and_does_not_matter():
    values = draw(6, 9)
    frame, step = frames(sgd(), values, 300)
    torch.testing.assert_close(step, values, rtol=1e-10, atol=1e-10)
    gram = frame.mT @ values @ values.mT @ frame
    torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-4)


def test_with_rows_and_a_momentum_that_stays_it_is_muon():
    values = draw(6, 9)
    u, _, vt = torch.linalg.svd(values, full_matrices=False)
    rows = Balance(passes=1, columns=False)
    assert torch.linalg.svdvals(frames(rows, values, 1)[1]).std() > 0.05
    torch.testing.assert_close(frames(rows, values, 400)[1], 3 * u @ vt, rtol=0, atol=1e-3)  # 3: a row of rms 1
    torch.testing.assert_close(frames(rows, values, 1, start=u)[1], 3 * u @ vt, rtol=0, atol=1e-5)


@pytest.mark.parametrize("base", [sign(), Balance()])
def test_the_axes_of_rows_do_not_matter(base: Any):
    """A turned problem that begins with a turned frame is the same problem; signs alone are not."""
    turn = torch.linalg.qr(draw(6, 6, seed=3)).Q
    ends = []
    for spin in (torch.eye(6).double(), turn):
        weight = nn.Parameter(spin @ draw(6, 9))
        optimizer = Optimizer([([weight], wide(TurningFrame(base=base)))], lr=0.1)
        for step in range(6):
            weight.grad = spin @ gradient((6, 9), 0, step)
            if step == 0:  # no values yet: an empty step makes the state
                real, weight.grad = weight.grad, torch.zeros_like(weight)
                optimizer.step()
                optimizer.state[weight]["frame"].copy_(spin)
                weight.grad = real
            optimizer.step()
        ends.append(spin.mT @ weight.detach())
    torch.testing.assert_close(*ends, rtol=0, atol=1e-7)
    assert not torch.allclose(turn.mT @ (turn @ draw(6, 9)).sign(), draw(6, 9).sign(), atol=0.1)


def test_frames_stay_orthonormal_also_where_there_is_nothing():
    kind = TurningFrame(base=Balance())
    values = draw(2, 6, 9).float()
    values[0, 3:] = 0  # rank three
    state = kind.init(values, torch.tensor([0, 1]))
    for step in range(20):
        now = values * 0 if step % 5 == 1 else values.roll(step, 2)
        assert bool(kind.update(now, state, now).isfinite().all())
        eye = state["frame"].mT @ state["frame"]
        torch.testing.assert_close(eye, torch.eye(6).expand(2, 6, 6), rtol=0, atol=1e-5)


def test_rows_and_columns_are_balanced():
    found = Balance(passes=12).update(draw(3, 6, 9), {}, draw(3, 6, 9))
    for axis in (-1, -2):
        torch.testing.assert_close(
            found.square().mean(axis).sqrt(), torch.ones_like(found).mean(axis), rtol=0, atol=0.02
        )
    assert float(Balance().update(torch.zeros(1, 2, 3), {}, torch.zeros(1)).abs().max()) == 0


def test_a_base_with_a_state_is_refused():
    with pytest.raises(ValueError, match="has a state"):
        walk(ours(aro(base=adam())), [(6, 9)], 1)
    assert_same(walk(ours(aro()), [(7,)]), walk(ours(adam()), [(7,)]), rtol=0, atol=0)
