"""Rounding of steps: right on average, the same after a stop, and needed."""

import io
from typing import Any

import pytest
import torch
from contracts.examples import draw
from torch import Tensor, nn

from rankwise import Optimizer, StochasticRounding
from rankwise.core.states import leaves
from rankwise.linalg import stochastic_bfloat16
from rankwise.optimizers import adam, galore, sgd, weight_norm

BELOW = 2.0**-8  # from 1 to the bfloat16 before it


def test_the_mean_of_roundings_is_the_value_and_each_is_a_neighbour():
    """For values of all sizes and signs, at bounds of binades and below the normal range; 4 standard errors."""
    values = torch.cat(
        [draw(1, 30)[0].float() * 10.0 ** torch.arange(-20, 10), torch.tensor([1.999, -0.5, 1e-39])]
    )
    draws = 4000
    rounded = stochastic_bfloat16(
        values.expand(draws, -1).contiguous(), torch.Generator().manual_seed(3)
    ).double()
    bits = values.view(torch.int32)
    inner, outer = (((bits & -(2**16)) + add).view(torch.float32).double() for add in (0, 2**16))
    exact = (bits & (2**16 - 1)) == 0
    assert bool(((rounded == inner) | (rounded == outer)).all())
    assert torch.equal(rounded[0][exact], values[exact].double())
    error = (rounded.mean(0) - values.double()).abs()
    assert bool((error <= 4 * (outer - inner).abs() / 2 / draws**0.5).all())


def test_what_is_not_finite_stays():
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
    rounded = stochastic_bfloat16(values, torch.Generator())
    torch.testing.assert_close(rounded.float(), values, rtol=0, atol=0, equal_nan=True)


def walk(steps: int, lr: float, decay: float = 0.0, **options: Any) -> Tensor:
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = Optimizer([([weight], sgd())], lr=lr, weight_decay=decay, **options)
    for _ in range(steps):
        weight.grad = torch.ones_like(weight) if decay == 0 else torch.zeros_like(weight)
        optimizer.step()
    return weight.detach().double()


def test_small_steps_and_decay_are_lost_by_rounding_to_the_nearest_but_not_at_random():
    """A tenth of the distance of neighbours below 1, 50 times."""
    small = BELOW / 10
    for options in ({"lr": small}, {"lr": 1.0, "decay": small}):
        assert torch.equal(walk(50, **options), torch.ones(64, 64).double())
        moved = walk(50, **options, write=StochasticRounding())
        wanted = 1 - 50 * small if "decay" not in options else (1 - small) ** 50
        assert abs(float(moved.mean()) - wanted) < 4 * float(moved.std()) / 64


def trained(optimizer: Optimizer, steps: range, alone: bool = False) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        for i, p in enumerate(params):
            p.grad = draw(*p.shape, seed=10 * step + i).to(p.dtype)
        if not alone:
            optimizer.step()
        for p in reversed(params) if alone else []:
            optimizer.step_one(p)


def begin(seed: int = 0, **options: Any) -> tuple[list[nn.Parameter], Optimizer]:
    shapes = [(6, 9), (6, 9), (9, 6), (1, 7)]
    params = [nn.Parameter(draw(*shape, seed=i).bfloat16()) for i, shape in enumerate(shapes)]
    params.append(nn.Parameter(draw(3, 3).float()))
    groups = [(params[:2], galore(rank=2, every=3)), (params[2:], adam())]
    write = StochasticRounding(seed)
    return params, Optimizer(groups, lr=1e-3, weight_decay=0.1, write=write, **options)


def same(one: list[nn.Parameter], two: list[nn.Parameter]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one, two, strict=True))


def test_stop_save_load_and_go_on_is_exact_and_seeds_matter():
    (one, first), (two, second), (three, third) = begin(), begin(), begin(seed=1)
    trained(first, range(4))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        for p, q in zip(two, one, strict=True):
            p.copy_(q)
    second.load_state_dict(torch.load(file, weights_only=True))
    for optimizer in (first, second):
        trained(optimizer, range(4, 9))
    assert same(one, two)
    trained(third, range(9))
    assert not same(one, three)
    assert first.state_bytes() == sum(leaf.nbytes for state in first.state.values() for leaf in leaves(state))


@pytest.mark.parametrize("alone", [False, True])
def test_stacks_and_hooks_take_the_same_random_numbers(alone: bool):
    (one, first), (two, second) = begin(), begin(stack_bytes=0)
    trained(first, range(4))
    trained(second, range(4), alone)
    assert same(one, two)


def test_states_without_random_numbers_are_refused_and_so_is_float16():
    params, optimizer = begin()
    trained(optimizer, range(1))
    plain = Optimizer([(params[:2], galore(rank=2, every=3)), (params[2:], adam())], lr=0.1)
    with pytest.raises(ValueError, match="other entries"):
        plain.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="float16"):
        Optimizer([([nn.Parameter(torch.ones(2).half())], adam())], lr=0.1, write=StochasticRounding())


def test_constraints_of_bfloat16_are_rounded_at_random_too():
    """To the nearest, small changes by a constraint are lost, and lengths are not learnt."""
    start = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    lengths = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = nn.Parameter(start.clone().to(dtype))
        optimizer = Optimizer([([weight], weight_norm())], lr=1e-3, write=StochasticRounding())
        for _ in range(300):
            weight.grad = weight.detach().clone()  # shorter is better
            optimizer.step()
        lengths[dtype] = float(weight.detach().float().norm() / start.norm())
    assert lengths[torch.float32] < 0.97
    assert lengths[torch.bfloat16] == pytest.approx(lengths[torch.float32], abs=0.005)


def test_the_type_of_parameters_may_change_after_the_first_step():
    weight = nn.Parameter(torch.ones(2000))
    optimizer = Optimizer([([weight], sgd())], lr=1e-4, write=StochasticRounding())
    bytes_before = optimizer.state_bytes()
    for step in range(21):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        if step == 0:
            assert float(weight.detach().mean()) == pytest.approx(1 - 1e-4)
            weight.data = torch.ones(2000, dtype=torch.bfloat16)
            weight.grad = None
    assert float(weight.detach().float().mean()) == pytest.approx(1 - 20e-4, abs=4e-4)  # 6 standard errors
    assert sum(leaf.nbytes for leaf in leaves(optimizer.state_dict()["state"])) == bytes_before
    weight.data, weight.grad = torch.ones(2000).half(), torch.ones(2000).half()
    with pytest.raises(ValueError, match="float16 needs float32 weights"):
        optimizer.step()
