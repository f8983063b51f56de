"""States in few bits: what stays exact, what is near, and what is known to go wrong otherwise."""

from typing import Any

import pytest
import torch
from contracts.examples import draw
from torch import Tensor, nn

from rankwise import Optimizer
from rankwise.core.states import leaves
from rankwise.core.transforms import Transform, state_bytes
from rankwise.linalg import dynamic_table
from rankwise.optimizers import adam, adamw4bit, adamw8bit, galore, quantised, sgd
from rankwise.projectors import Keep, Rotate


def walk(transform: Transform, steps: int, shape: tuple[int, ...] = (12, 30), gradients: Any = None) -> Tensor:
    weight = nn.Parameter(draw(*shape))
    optimizer = Optimizer([([weight], transform)], lr=0.01)
    for step in range(steps):
        weight.grad = draw(*shape, seed=step) if gradients is None else gradients[step]
        optimizer.step()
    return weight.detach()


def test_short_tensors_stay_as_they_are():
    assert torch.equal(walk(quantised(adam()), 5), walk(adam(), 5))
    assert not torch.equal(walk(quantised(adam(), least=1), 5), walk(adam(), 5))


def test_around_a_projection_is_inside_of_it():
    """Bases stay whole either way. Moments that are carried are rounded once more inside."""
    for carry, close in ((Keep(), 0.0), (Rotate(), 1e-3)):
        around = quantised(galore(rank=3, every=4, carry=carry), least=1)
        inside = galore(rank=3, every=4, carry=carry, inner=quantised(adam(), least=1))
        torch.testing.assert_close(walk(around, 10), walk(inside, 10), rtol=0, atol=close)


@pytest.mark.parametrize(("bits", "near"), [(8, 0.02), (4, 0.25)])
def test_steps_are_near_those_of_adam(bits: int, near: float):
    kind = quantised(adam(betas=(0.9, 0.95)), bits=bits, block=32, least=1)
    begin, coded, exact = walk(kind, 0), walk(kind, 20), walk(adam(betas=(0.9, 0.95)), 20)
    assert float((coded - exact).norm()) < near * float((exact - begin).norm())


@pytest.mark.parametrize("kind", [quantised(adam(), least=1), quantised(adam(), bits=4, least=1)])
def test_a_mean_of_equal_gradients_below_zero_is_not_pulled_towards_zero(kind: Transform):
    """With the published table the lowest value is above -1, so that each step would lose some of the mean."""
    grad = -torch.ones(1, 4, 8)
    state: Any = kind.init(grad, torch.tensor([0]))
    for _ in range(30):
        direction = kind.update(grad, state, grad)
    torch.testing.assert_close(direction, -torch.ones(1, 4, 8), rtol=1e-5, atol=0)
    kept, lost = 0.9, [1.0]
    for _ in range(30):  # what the published lowest value of 4 bits makes of it
        lost.append((lost[-1] * kept + (1 - kept)) * 0.8875)
    assert lost[-1] < 0.6


def test_small_squares_do_not_vanish_beside_large_ones():
    """They would round to zero, and the mean over eps be the step."""
    grad = torch.ones(1, 2, 16)
    grad[0, 0, 3] = 1e-4
    smallest = dynamic_table(8, signed=False)[1]
    assert smallest / 2 > 1e-8  # so zero is the nearest value to the square
    kind = quantised(adam(), least=1)
    state: Any = kind.init(grad, torch.tensor([0]))
    for _ in range(5):
        direction = kind.update(grad, state, grad)
        assert 0 < float(direction[0, 0, 3]) < 1.01
    assert 1e-4 / adam().eps > 1e3  # type: ignore[attr-defined]


def test_slow_means_stay_where_they_are_until_much_changes():
    """A limit of these codes: a square that should fall by a tenth of a per cent a step does not fall."""
    grad = torch.ones(1, 2, 16)
    grad[0, 0, 3] = 0.5
    exact, coded = adam(), quantised(adam(), least=1)
    states: Any = [kind.init(grad, torch.tensor([0])) for kind in (exact, coded)]
    for step in range(600):
        grad[0, 0, 3] = 0.5 if step < 200 else 0.05
        exact.update(grad, states[0], grad)
        direction = coded.update(grad, states[1], grad)
    assert float(states[0]["square"][0, 0, 3] / states[0]["square"][0, 0, 0]) < 0.12
    assert float(direction[0, 0, 3]) == pytest.approx(0.05 / 0.5, rel=0.15)  # as if it had stayed at about 0.25


@pytest.mark.parametrize(("kind", "bits", "block"), [(adamw8bit(), 8, 256), (adamw4bit(), 4, 128)])
@pytest.mark.parametrize("shape", [(64, 64), (63, 67), (4095,), (4096,), (100, 10, 3, 3)])
def test_states_take_what_the_formula_says(kind: Transform, bits: int, block: int, shape: tuple[int, ...]):
    weight = torch.empty(shape)
    n, dims = weight.numel(), min(len(shape), 2)
    coded = 2 * (-(-n // 8) * bits + 4 * -(-n // block) + 8 * dims)
    assert state_bytes(kind, weight) == 8 + (coded if n >= 4096 else 2 * 4 * n)


def test_states_are_integers_and_scales():
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    optimizer = Optimizer([([weight], quantised(sgd(beta=0.9)))], lr=0.1)
    optimizer.step()
    kinds = {leaf.dtype for leaf in leaves(optimizer.state[weight])}
    assert kinds == {torch.uint8, torch.float32, torch.int64}


def test_what_is_in_few_bits_is_not_put_into_few_bits_again():
    for inner in (adamw8bit(), galore(rank=2, inner=adamw4bit())):
        with pytest.raises(ValueError, match="in few bits already"):
            quantised(inner)


@pytest.mark.parametrize(
    ("options", "name"), [({"bits": 1}, "bits"), ({"bits": 9}, "bits"), ({"block": 0}, "block")]
)
def test_bad_fields_are_refused(options: dict[str, Any], name: str):
    with pytest.raises(ValueError, match=name):
        quantised(adam(), **options)
