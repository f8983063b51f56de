"""SOAP: Adam in bases of its own."""

import pytest
import torch
from optimizers.walks import assert_same, draw, gradient, ours, walk
from torch import Tensor

from rankwise.core.transforms import Transform
from rankwise.optimizers import adam, soap
from rankwise.optimizers.soap import DAMPING, eigenvectors
from rankwise.projectors import Every

BETAS = (0.8, 0.9)


def improved(gram: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The order of the estimated eigenvalues, and the columns of a power step in that order, by Gram-Schmidt."""
    order = (basis.mT @ gram @ basis).diagonal().argsort(descending=True)
    power = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram)).double()
    columns: list[Tensor] = []
    for column in (power @ basis[:, order]).mT:
        for other in columns * 2:
            column = column - other * (other @ column)
        columns.append(column / column.norm())
    return order, torch.stack(columns, dim=1)


@pytest.mark.parametrize("sides", ["both", "left"])
def test_it_is_its_formula(sides: str):
    """A plain loop: the mean in the space of the weight, squares in that of the bases."""
    shape = (6, 6) if sides == "both" else (6, 9)
    (b1, b2), beta, f = BETAS, 0.7, 3
    weight, mean, square = draw(*shape, seed=0), torch.zeros(shape).double(), torch.zeros(shape).double()
    left, right = torch.eye(shape[0]).double(), torch.eye(shape[1]).double()
    one, two = torch.zeros_like(left), torch.zeros_like(right)
    for t in range(1, 15):
        grad = gradient(shape, 0, t - 1)
        mean = b1 * mean + (1 - b1) * grad
        square = b2 * square + (1 - b2) * (left.mT @ grad @ right) ** 2
        inside = (left.mT @ mean @ right) / (1 - b1**t) / ((square / (1 - b2**t)).sqrt() + 1e-8)
        weight = weight - 0.05 * left @ inside @ right.mT
        one, two = beta * one + (1 - beta) * grad @ grad.mT, beta * two + (1 - beta) * grad.mT @ grad
        if t == 1:
            left = eigenvectors(one[None])[0]
            right = eigenvectors(two[None])[0] if sides == "both" else right
            square = (1 - b2) * (left.mT @ grad @ right) ** 2
        elif (t - 1) % f == 0:
            order, left = improved(one, left)
            square = square[order]
            if sides == "both":
                order, right = improved(two, right)
                square = square[:, order]
    kind = soap(every=Every(f, together=True), betas=BETAS, beta=beta, largest=6)
    (found,) = walk(ours(kind), [shape], 14)
    torch.testing.assert_close(found, weight, rtol=1e-7, atol=1e-7)


def test_with_no_side_short_enough_it_is_adam():
    assert_same(walk(ours(soap(largest=0, betas=BETAS))), walk(ours(adam(betas=BETAS))), rtol=1e-12, atol=1e-12)


def steps_of(kind: Transform, turn: Tensor) -> list[Tensor]:
    """Directions of steps on gradients that are turned, brought back."""
    weight = torch.nn.Parameter(torch.zeros(6, 9).double())
    optimizer, found = ours(kind, lr=1.0)([weight]), []
    for step in range(9):
        before = weight.detach().clone()
        weight.grad = turn @ gradient((6, 9), 0, step)
        optimizer.step()
        found.append(turn.mT @ (weight.detach() - before))
    return found


def test_the_axes_do_not_matter_after_the_first_step():
    """But for what makes eigenvectors definite."""
    turn = torch.linalg.qr(draw(6, 6, seed=7)).Q
    one, two = (steps_of(soap(every=3), t) for t in (torch.eye(6).double(), turn))
    assert_same(one[1:], two[1:], rtol=0, atol=5e-3)
    assert not torch.allclose(one[0], two[0], atol=0.1)
    one, two = (steps_of(adam(), t) for t in (torch.eye(6).double(), turn))
    assert not torch.allclose(one[5], two[5], atol=0.1)


def test_eigenvectors_are_sorted_and_definite():
    root = draw(2, 7, 4)
    gram = root @ root.mT
    found = eigenvectors(gram)
    values = found.mT @ gram @ found
    torch.testing.assert_close(values, torch.diag_embed(values.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-3)
    assert bool((values.diagonal(dim1=1, dim2=2).diff(dim=1) <= 1e-3).all())
    noise = 1e-15 * draw(2, 7, 7, seed=3)
    again = eigenvectors(gram + noise + noise.mT)  # the same, of eigenvalue zero too
    torch.testing.assert_close((again * found).sum(1).abs(), torch.ones(2, 7).double(), rtol=0, atol=1e-8)


def test_rounding_does_not_choose_what_the_first_gradient_leaves_open():
    """As of a process that adds up in another order; without the float64 products rounding would decide."""
    kind = soap().matrix  # type: ignore[attr-defined]
    low = (draw(1, 200, 4) @ draw(1, 4, 150, seed=1)).float()
    bases = []
    for grad in (low, low + 1e-7 * low.abs().mean() * draw(1, 200, 150, seed=2).float()):
        state = kind.init(grad, torch.tensor([0]))
        kind.update(grad, state, grad)
        bases.append([state[side]["basis"] for side in ("left", "right")])
    for one, two in zip(*bases, strict=True):
        assert bool(((one * two).sum(1).abs() > 0.999).all())


def test_power_steps_reach_the_eigenvectors_of_what_stays():
    kind = soap(every=1, beta=0.5).matrix  # type: ignore[attr-defined]
    # a spectrum that is far apart, turned after the first step
    first, turn = torch.diag(2.0 ** -torch.arange(5.0)).double(), torch.linalg.qr(draw(5, 5)).Q
    state = kind.init(first[None], torch.tensor([0]))
    for step in range(40):
        grad = (first if step == 0 else turn @ first)[None]
        kind.update(grad, state, grad)
    basis, gram = state["left"]["basis"][0], state["left"]["gram"][0]
    values = basis.mT @ gram @ basis
    torch.testing.assert_close(values.diagonal().diag(), values, rtol=0, atol=1e-5)
    torch.testing.assert_close((basis.mT @ turn).abs(), torch.eye(5).double(), rtol=0, atol=1e-4)
