"""States of parameters that are stepped together: in one place, also where some have no gradient."""

import io
from typing import Any

import pytest
import torch
from contracts.examples import draw
from torch import Tensor, nn

from rankwise import Optimizer, optimizers
from rankwise.core.states import leaves
from rankwise.core.transforms import Transform
from rankwise.linalg import orthonormal
from rankwise.linalg.orthonormal import power_steps
from rankwise.optimizers import adafactor, adam, adamp, apollo, frugal, galore, grad_norm_lorp, weight_norm


def experts(count: int = 12) -> list[nn.Parameter]:
    return [nn.Parameter(draw(6, 8, seed=i).float()) for i in range(count)]


def held(optimizer: Optimizer) -> int:
    """Bytes of the memory that the states keep alive."""
    storages = {
        leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for leaf in leaves(state)
    }
    return sum(storages.values())


@pytest.mark.parametrize("transform", [adam(), galore(rank=2), adafactor()], ids=["adam", "galore", "adafactor"])
def test_experts_that_are_not_chosen_cost_nothing_more(transform: Transform):
    together, alone = experts(), experts()
    one, other = (
        Optimizer([(together, transform)], lr=0.1),
        Optimizer([(alone, transform)], lr=0.1, stack_bytes=1),
    )
    for step in range(20):
        chosen = range(12) if step in (0, 9) else [(5 * step + i) % 12 for i in range(1 + step % 4)]
        for i in chosen:
            together[i].grad = draw(6, 8, seed=100 * step + i).float()
            alone[i].grad = together[i].grad
        for optimizer in (one, other):
            optimizer.step()
            optimizer.zero_grad()
        assert held(one) == one.state_bytes()
    assert all(torch.equal(p, q) for p, q in zip(together, alone, strict=True))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    plain = io.BytesIO()
    torch.save(other.state_dict(), plain)
    assert len(file.getvalue()) <= len(plain.getvalue())


def test_states_that_a_user_replaces_are_gone_on_with():
    params, usual = experts(3), experts(3)
    moved, plain = Optimizer([(params, adam())], lr=0.1), Optimizer([(usual, adam())], lr=0.1)
    for step in range(4):
        for own in (params, usual):
            for i, param in enumerate(own):
                param.grad = draw(6, 8, seed=10 * step + i).float()
        moved.step()
        plain.step()
        for state in moved.state.values():  # as one does who keeps states elsewhere between steps
            for name, value in state.items():
                state[name] = value.clone() if isinstance(value, Tensor) else value
    assert all(torch.equal(p, q) for p, q in zip(params, usual, strict=True))
    kept, wanted = moved.state_dict()["state"], plain.state_dict()["state"]
    for number, state in wanted.items():
        assert all(torch.equal(a, b) for a, b in zip(leaves(kept[number]), leaves(state), strict=True))


def test_a_state_that_a_user_empties_begins_again():
    params = experts(2)
    optimizer = Optimizer([(params, adam())], lr=0.1)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        optimizer.state[params[0]] = {}
    params[0].grad = params[1].grad = torch.ones(6, 8)
    optimizer.step()
    steps = [int(optimizer.state[param]["step"]) for param in params]
    assert steps == [1, 3]


def test_wrong_arguments_are_named():
    (param,) = experts(1)
    optimizer = Optimizer([([param], adam())], lr=0.1)
    for group, words in (
        ({"lr": float("inf")}, "lr must be a finite number >= 0"),
        ({"weight_decay": None}, "weight_decay must be a finite number >= 0, got None"),
        ({"params": nn.Linear(2, 2)}, r"parameters of Linear, as by model.parameters\(\)"),
    ):
        with pytest.raises(ValueError, match=words):
            optimizer.add_param_group({"params": experts(1), "transform": adam(), **group})
        assert len(optimizer.param_groups) == 1
    wrong: Any = "stochastic"
    with pytest.raises(TypeError, match=r"write must be an object such as StochasticRounding\(\)"):
        Optimizer([([param], adam())], lr=0.1, write=wrong)


READING = {
    "galore": galore(rank=2, inner=adamp()),
    "galore, relative": galore(rank=2, inner=adafactor(relative=True)),
    "frugal": frugal(inner=adamp()),
    "frugal, rest": frugal(free=adamp()),
    "apollo": apollo(rank=2, inner=adamp()),
    "weight_norm": weight_norm(inner=adamp()),
    "grad_norm_lorp": grad_norm_lorp(rank=2, two_sided=True, inner=adamp()),
}


@pytest.mark.parametrize("name", READING)
def test_what_reads_parameters_is_refused_where_there_are_none(name: str):
    params = experts(2)
    other = nn.Parameter(torch.ones(3))
    optimizer = Optimizer([([other], optimizers.sgd()), (params, READING[name])], lr=0.1)
    for param in (*params, other):
        param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="reads the values of parameters"):
        optimizer.step()
    assert torch.equal(other, torch.ones(3))


def test_power_steps_of_very_large_and_small_numbers():
    values, basis = draw(3, 20, 30).float(), orthonormal(draw(3, 20, 4, seed=1).float())
    wanted = power_steps(values, basis, 2)
    for factor in (2.0**90, 2.0**-90):
        assert torch.equal(power_steps(values * factor, basis, 2), wanted)
    zero = power_steps(torch.zeros(1, 5, 6), torch.eye(5)[None, :, :2], 1)
    assert bool(zero.isfinite().all())
