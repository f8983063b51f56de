"""Weights that train as integers: right on average, still where nothing happens, exact to resume."""

import copy
import io
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from contracts.examples import draw
from torch import Tensor, nn

from rankwise import Optimizer
from rankwise.core.combining import chain
from rankwise.core.integer_weights import IntegerLinear, IntegerWeights, train_as_floats, train_as_integers
from rankwise.core.memory import held_bytes
from rankwise.core.states import leaves
from rankwise.core.transforms import Transform
from rankwise.linalg import add_to_integers, integer_grid
from rankwise.optimizers import adam, q_galore, row_cap
from rankwise.projectors import Backoff


def rounded(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale, offset = integer_grid(values)
    codes = ((values - offset[..., None]) / scale[..., None]).round()
    assert bool(((codes >= 0) & (codes <= 255)).all())
    return codes.byte(), scale, offset


@pytest.mark.parametrize("kind", ["both signs", "above zero", "below zero", "constant", "zero", "tiny", "narrow"])
def test_groups_of_any_kind_are_kept_to_half_a_step(kind: str):
    drawn = draw(3, 64).float()
    values = {
        "both signs": drawn,
        "above zero": drawn.abs() + 1,
        "below zero": -drawn.abs() - 5,
        "constant": torch.full((3, 64), 0.3),
        "zero": torch.zeros(3, 64),
        "tiny": drawn * 1e-30,
        "narrow": 1 + drawn * 1e-9,
    }[kind]
    codes, scale, offset = rounded(values)
    found = codes * scale[..., None] + offset[..., None]
    assert bool(((found - values).abs() <= (0.5 + 1e-3) * scale[..., None]).all())
    assert float(scale.max()) <= max(1.2 / 255 * float((values.amax(-1) - values.amin(-1)).max()), 0.01)


def test_steps_count_on_average_and_are_lost_by_rounding_to_the_nearest():
    """A tenth of the distance of two codes, 20 times; 4 standard errors of a sum of 20 draws."""
    codes, scale, offset = rounded(draw(50, 64).float().clamp(-2, 2))
    middle = (codes > 20) & (codes < 235)
    small = 0.1 * scale[..., None].expand(50, 64)
    moved, nearest, generator = codes, codes, torch.Generator().manual_seed(0)
    for _ in range(20):
        moved, new_scale, new_offset = add_to_integers(moved, scale, offset, small * middle, generator)
        nearest = (nearest + small / scale[..., None] * middle).round()
    assert torch.equal(nearest, codes.float())
    assert torch.equal(new_scale, scale)
    assert torch.equal(new_offset, offset)
    steps = (moved.double() - codes)[middle]
    assert abs(float(steps.mean()) - 2) < 4 * float(steps.std()) / len(steps) ** 0.5
    assert float(steps.std()) < 2 * (20 * 0.1 * 0.9) ** 0.5
    assert torch.equal(moved[~middle], codes[~middle])


def test_where_nothing_changes_no_code_does_but_a_number_that_leaves_gets_a_new_grid():
    codes, scale, offset = rounded(draw(2, 64).float())
    change = torch.zeros(2, 64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        again = add_to_integers(codes, scale, offset, change, generator)
        assert all(torch.equal(a, b) for a, b in zip(again, (codes, scale, offset), strict=True))
    change[1, 5] = 40.0
    values = codes * scale[:, None] + offset[:, None] + change
    draws = [add_to_integers(codes, scale, offset, change, generator) for _ in range(1000)]
    assert all(torch.equal(new[0][0], codes[0]) for new in draws)
    _, wide, low = draws[0]
    found = torch.stack([new[1].double() * wide[1] + low[1] for new, _, _ in draws])
    assert bool(((found - values[1]).abs() <= wide[1] * (1 + 1e-5)).all())
    assert bool(((found.mean(0) - values[1]).abs() <= 4 * float(wide[1]) / 2 / 1000**0.5).all())


def model(kind: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 16, bias=False), nn.Tanh(), nn.Linear(16, 3))
    return made.to(kind)


def integers(kind: torch.dtype = torch.float32) -> nn.Sequential:
    made = model(kind)
    assert train_as_integers(made, lambda name, layer: name in "02", group=5) == 2
    return made


def wanted(made: nn.Module) -> list[nn.Parameter]:
    return [p for p in made.parameters() if p.requires_grad]


def test_outputs_and_gradients_are_those_of_the_same_weights_and_add_up():
    made = integers()
    plain = copy.deepcopy(made)
    train_as_floats(plain)
    assert isinstance(plain[0], nn.Linear)
    inputs = [draw(5, 16).float().requires_grad_() for _ in range(2)]
    for _ in range(2):
        for each, x in zip((made, plain), inputs, strict=True):
            each(x).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for i in (0, 2):
        one: Any = made[i]
        other: Any = plain[i]
        torch.testing.assert_close(one.integers.change.grad, other.weight.grad)
        assert torch.equal(one.integers.dense(), other.weight)
    torch.testing.assert_close(made[0].bias.grad, plain[0].bias.grad)


def test_nothing_of_the_size_of_a_weight_is_kept_for_the_gradient_or_beside_the_codes():
    layer = IntegerLinear(nn.Linear(512, 64, bias=False), 256)
    assert held_bytes(layer.integers.matrix) == 64 * 512 + 64 * 2 * 2 * 4
    assert layer.integers.change.untyped_storage().nbytes() == 4
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.untyped_storage().nbytes()) or t, lambda t: t
    ):
        layer(torch.ones(2, 512, requires_grad=True)).sum()
    assert max(sizes) <= 4 * 2 * 512


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_types_and_checkpoints(kind: torch.dtype):
    """Scales stay float32, also in a model of bfloat16, and a checkpoint holds codes but no change."""
    made: Any = integers(kind)
    exact = made[0].integers.matrix.scale.clone()
    made = made.to(torch.bfloat16)
    assert torch.equal(made[0].integers.matrix.scale, exact)
    assert made(torch.ones(1, 16).bfloat16()).dtype == torch.bfloat16
    assert made[0].integers.change.untyped_storage().nbytes() == 2
    state = made.state_dict()
    assert not any("change" in name for name in state)
    other: Any = integers(torch.bfloat16)
    other[0].integers.matrix.packed.zero_()
    other.load_state_dict(state)
    assert torch.equal(other[0].integers.dense(), made[0].integers.dense())


def optimizer(made: nn.Module, seed: int = 0, transform: Transform | None = None, lr: float = 0.02) -> Optimizer:
    kind = transform or q_galore(rank=4, every=Backoff(3, recent=1))
    return Optimizer([(wanted(made), kind)], lr=lr, weight_decay=0.01, write=IntegerWeights(made, seed))


def trained(made: nn.Module, with_: Optimizer, steps: range, alone: bool = False) -> list[float]:
    losses = []
    for _ in steps:
        loss = (made(draw(32, 16).float().to(made[4].weight.dtype)).float() - draw(32, 3, seed=1)).square().mean()  # type: ignore[index]
        with_.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        if not alone:
            with_.step()
        for p in wanted(made) if alone else []:
            with_.step_one(p)
    return losses


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_it_learns_nearly_as_well_as_with_floats(kind: torch.dtype):
    made, plain = integers(kind), model(kind)
    plain_optimizer = Optimizer([(plain.parameters(), adam())], lr=0.02, weight_decay=0.01)
    losses = trained(made, optimizer(made, transform=adam()), range(60))
    assert losses[-1] < 0.5 * losses[0]
    assert losses[-1] < trained(plain, plain_optimizer, range(60))[-1] + 0.1 * losses[0]


def values(made: nn.Module) -> list[Tensor]:
    return [t.clone() for t in made.state_dict().values()]


def test_stop_save_load_and_go_on_is_exact():
    one, two, other = integers(), integers(), integers()
    first, second = optimizer(one), optimizer(two)
    trained(one, first, range(4))
    file = io.BytesIO()
    torch.save({"model": one.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    two.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    for made, each in ((one, first), (two, second)):
        trained(made, each, range(5))
    assert all(torch.equal(a, b) for a, b in zip(values(one), values(two), strict=True))
    trained(other, optimizer(other, seed=1), range(9))
    assert not all(torch.equal(a, b) for a, b in zip(values(one), values(other), strict=True))
    assert first.state_bytes() == sum(leaf.nbytes for state in first.state.values() for leaf in leaves(state))


def test_what_is_frozen_stays_so():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)).requires_grad_(False)
    model[1].requires_grad_(True)
    x = draw(3, 8).float().requires_grad_()
    train_as_integers(model, lambda name, layer: True)
    model(x).sum().backward()
    assert x.grad is not None
    assert [part.integers.change.grad is None for part in model] == [True, False]
    train_as_floats(model)
    assert [part.weight.requires_grad for part in model] == [False, True]


def test_layers_in_two_places_stay_one():
    shared = nn.Linear(8, 8)
    made = nn.Sequential(shared, nn.Tanh(), shared)
    assert train_as_integers(made) == 1
    assert made[0] is made[2]
    train_as_floats(made)
    assert made[0] is made[2]
    assert isinstance(made[0], nn.Linear)


def test_hooks_may_step_each_weight_alone():
    one, two = integers(), integers()
    trained(one, optimizer(one), range(5))
    trained(two, optimizer(two), range(5), alone=True)
    assert all(torch.equal(a, b) for a, b in zip(values(one), values(two), strict=True))


@dataclass(frozen=True)
class Reads(Transform):
    """Pulls weights to zero."""

    @property
    def reads_param(self) -> bool:
        return True

    def update(self, grad: Tensor, state: Any, param: Tensor) -> Tensor:
        return param.float()


def test_who_reads_parameters_sees_the_weights():
    made: Any = integers()
    each = optimizer(made, transform=Reads(), lr=1.0)
    for p in wanted(made):
        p.grad = torch.zeros_like(p)
    before = made[0].integers.dense().detach()
    each.step()
    assert float(made[0].integers.dense().detach().abs().max()) < 0.02 * float(before.abs().max())


def test_bad_choices_are_refused():
    with pytest.raises(ValueError, match="no layer was selected"):
        train_as_integers(model(), lambda name, layer: False)
    with pytest.raises(ValueError, match="no linear layer"):
        train_as_integers(nn.Sequential(nn.Conv2d(2, 2, 3)))
    with pytest.raises(ValueError, match="group"):
        train_as_integers(model(), group=0)
    with pytest.raises(ValueError, match="cannot be constrained"):
        optimizer(integers(), transform=chain(adam(), row_cap(limit=1.0)))
    with pytest.raises(ValueError, match="train_as_integers"):
        IntegerWeights(model())


def test_copies_and_counts_hold_the_change_as_one_number():
    model = nn.Sequential(nn.Linear(256, 32))
    train_as_integers(model)
    assert copy.deepcopy(model)[0].integers.change.stride() == (0, 0)
    assert held_bytes(model) < 2 * 256 * 32
