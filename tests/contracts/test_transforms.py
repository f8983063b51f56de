"""What every exported optimiser promises, and what the Optimizer promises for any of them."""

import copy
import io
import itertools
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from contracts.examples import draw
from torch import Tensor, nn

import rankwise
from rankwise import Layerwise, Optimizer, optimizers, projectors
from rankwise.core.combining import by_shape, chain
from rankwise.core.memory import optimizer_bytes
from rankwise.core.seen import wide
from rankwise.core.states import described, leaves, map_state
from rankwise.core.stored import Batched
from rankwise.core.transforms import Transform, within
from rankwise.core.writing import Write
from rankwise.optimizers import (
    adafactor,
    adam,
    adamp,
    adamw4bit,
    adamw8bit,
    apollo,
    apollo_mini,
    aro,
    auon,
    dct_adamw,
    fira,
    frugal,
    galore,
    hybrid_auon,
    ldadam,
    muon,
    project,
    q_galore,
    quantised,
    sgd,
    sgdp,
    sign,
    soap,
    trion,
)
from rankwise.optimizers.muon import Orthogonalize
from rankwise.optimizers.quantised import Quantised
from rankwise.optimizers.retractions import Cayley, Qr
from rankwise.projectors import (
    Backoff,
    Cosine,
    EnergyDrop,
    Every,
    Keep,
    LargestRows,
    RandomOrthogonal,
    RandomRows,
    Reset,
    Rotate,
    Svd,
)

SETTINGS: dict[str, list[Transform]] = {
    "adafactor": [adafactor(), adafactor(beta=0.9), adafactor(beta=0.5, relative=True, least=0.5)],
    "adam": [adam(), adam(betas=(0.0, 0.5))],
    "adamw4bit": [adamw4bit(), quantised(adam(), bits=4, block=8, least=1)],
    "adamw8bit": [adamw8bit()],
    "adamp": [adamp(), adamp(delta=math.inf, weight_decay=0.1), adamp(delta=0.5, whole=False)],
    "apollo": [apollo(rank=2, every=4), apollo(rank=0.5, every=3, projector=Svd(), growth=2.0)],
    "apollo_mini": [apollo_mini(every=4)],
    "aro": [aro(), aro(base=sign(), beta=0.5)],
    "auon": [auon(), auon(released=True, gamma=1.5)],
    "batched": [
        optimizers.batched(muon()),
        optimizers.batched(galore(rank=2, every=4)),
        optimizers.batched(optimizers.transposed(q_galore(rank=2, every=3))),
        optimizers.batched(chain(adam(), optimizers.soft_cap(limit=1.5))),
    ],
    "dct_adamw": [dct_adamw(rank=2), dct_adamw(rank=0.5, feedback=True, every=3, carry=Keep())],
    "fira": [fira(rank=2, every=4), fira(rank=0.5, every=3, removes=0.25, inner=sgd(beta=0.9))],
    "frugal": [
        frugal(every=4),
        frugal(density=0.0),
        frugal(density=1.0),
        frugal(projector=Svd(), free=sgd()),
        frugal(every=4, entries=True),
    ],
    "galore": [
        galore(rank=2, every=4),
        galore(rank=0.5, every=3, scale=1.0, projector=Svd(), inner=sgd(beta=0.9), carry=Rotate()),
        galore(rank=2, every=4, inner=adafactor()),
    ],
    "grad_norm_lorp": [
        optimizers.grad_norm_lorp(rank=2, every=4, scale=1.0),
        optimizers.grad_norm_lorp(rank=2, every=3, scale=1.0, two_sided=True, projector=Svd()),
    ],
    "hard_cap": [chain(adam(), optimizers.hard_cap(limit=1.5))],
    "lipschitz": [optimizers.lipschitz(limit=1.5), optimizers.lipschitz(constraint=sgd(), nesterov=False)],
    "hybrid_auon": [hybrid_auon()],
    "ldadam": [ldadam(rank=2), ldadam(rank=0.5, every=3, feedback=False, projector=Svd())],
    "muon": [muon(), muon(nesterov=False, beta=0.5)],
    "project": [project(Cosine(), adam(), rank=3, every=EnergyDrop(steps=2), carry=Reset())],
    "q_galore": [
        q_galore(rank=2, every=Backoff(2, recent=1)),
        q_galore(rank=2, every=3, inner=quantised(adam(), least=1)),
    ],
    "oblique": [
        optimizers.oblique(scale=0.5),
        optimizers.oblique(scale=0.5, inner=adam(), magnitude=sgd(beta=0.9)),
        optimizers.oblique(),
    ],
    "orthogonal_penalty": [
        optimizers.orthogonal_penalty(),
        optimizers.orthogonal_penalty(scale=0.5, inner=adam()),
    ],
    "quantised": [
        quantised(adam(), least=1, block=16),
        quantised(galore(rank=2, every=4, carry=Rotate()), least=1, block=16),
        galore(rank=2, every=3, inner=quantised(adam(), least=1, block=16), carry=Rotate()),
        quantised(chain(adafactor(), sgd(beta=0.9)), least=1),
        quantised(soap(every=3), least=1, block=16),
        quantised(ldadam(rank=2), least=1, block=16),
    ],
    "row_cap": [chain(adam(), optimizers.row_cap(limit=0.8))],
    "sgd": [sgd(), sgd(beta=0.9), sgd(beta=0.9, nesterov=True)],
    "sgdp": [sgdp(), sgdp(delta=0.5, weight_decay=0.1, nesterov=True)],
    "sign": [sign()],
    "soft_cap": [chain(adam(), optimizers.soft_cap(limit=1.5)), optimizers.soft_cap(limit=1.5, step=2.0)],
    "spectral_decay": [chain(adam(), optimizers.spectral_decay(rate=0.1))],
    "spectral_hammer": [chain(adam(), optimizers.spectral_hammer(limit=0.3, steps=1))],
    "spectral_normalize": [
        chain(adam(), optimizers.spectral_normalize(limit=1.5)),
        optimizers.spectral_normalize(limit=1.5),
    ],
    "stiefel": [
        optimizers.stiefel(scale=0.5),
        optimizers.stiefel(scale=0.5, retraction=Qr(), inner=adam(), magnitude=sgd(beta=0.9)),
        optimizers.stiefel(scale=0.5, retraction=Cayley(), inner=chain(sgd(beta=0.5), Orthogonalize())),
        optimizers.stiefel(),
    ],
    "tscnc": [optimizers.tscnc(), optimizers.tscnc(condition=0.1, inner=galore(rank=2, every=4))],
    "weight_norm": [
        optimizers.weight_norm(),
        optimizers.weight_norm(inner=galore(rank=2, every=4), magnitude=sgd(beta=0.9)),
    ],
    "soap": [soap(every=3), soap(every=Every(2, together=True), largest=7)],
    "transposed": [optimizers.transposed(muon()), optimizers.transposed(adamp()), optimizers.transposed(adam())],
    "trion": [trion(rank=2), trion(rank=0.5, every=3, projector=Svd())],
}
SHAPES = [(6, 9), (6, 9), (6, 9), (9, 6), (5, 3, 2, 2), (7,), (7,), (), (1, 4), (0, 3)]


def test_all_optimisers_are_here():
    assert sorted(SETTINGS) == sorted(optimizers.__all__)


@pytest.fixture(params=[(name, i) for name in SETTINGS for i in range(len(SETTINGS[name]))], ids=str)
def transform(request: pytest.FixtureRequest) -> Transform:
    name, i = request.param
    return SETTINGS[name][i]


def parameters(dtype: torch.dtype = torch.float64, shapes: Any = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [nn.Parameter(values.to(dtype)) for values in drawn]


def give_gradients(params: list[nn.Parameter], step: int, without: tuple[int, ...] = ()) -> None:
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        p.grad = None if i in without else grad


def trained(optimizer: Optimizer, steps: range, without: dict[int, tuple[int, ...]] | None = None) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        give_gradients(params, step, (without or {}).get(step, ()))
        optimizer.step()


def through_a_file(optimizer: Optimizer) -> Any:
    """What plain torch reads back."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same_layout(one: Tensor, two: Tensor) -> Tensor:
    strides = [[s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1] for x in (one, two)]
    assert strides[0] == strides[1]
    return one


def same(one: Sequence[Tensor], two: Sequence[Tensor], **close: float) -> None:
    for p, q in zip(one, two, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), **(close or {"rtol": 0, "atol": 0}))


def test_it_lowers_a_quadratic(transform: Transform):
    """|W X - Y|^2 over 60 steps of an lr that falls, at one of two lengths of steps."""
    x, y = draw(9, 30), draw(6, 30, seed=1)

    def loss_after(lr: float) -> float:
        weight = nn.Parameter(0.5 * torch.eye(6, 9).double())  # a zero matrix would have no scale
        bias = nn.Parameter(torch.full((6, 1), 0.1).double())
        optimizer = Optimizer([([weight, bias], transform)], lr=lr)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 60)
        loss = torch.tensor(0.0)
        for _ in range(60):
            optimizer.zero_grad()
            loss = (weight @ x + bias - y).square().mean()
            loss.backward()
            optimizer.step()
            schedule.step()
        return float(loss.detach())

    assert any(loss_after(lr) < 0.9 * float(y.square().mean()) for lr in (1e-1, 1e-2))


def test_shapes_types_and_gradients_stay(transform: Transform):
    params = parameters()
    optimizer = Optimizer([(params, transform)], lr=0.1)
    for step in range(3):
        give_gradients(params, step)
        before = [(p.detach().clone(), p.grad.clone()) for p in params]  # type: ignore[union-attr]
        optimizer.step()
        for p, (value, grad) in zip(params, before, strict=True):
            assert (p.shape, p.dtype) == (value.shape, value.dtype)
            assert p.grad is not None
            torch.testing.assert_close(p.grad, grad, rtol=0, atol=0)
            assert p.numel() == 0 or not torch.equal(p, value) or not grad.any()


def test_convolutions_are_matrices(transform: Transform):
    if isinstance(transform, Batched):
        pytest.skip("a parameter of more axes is a stack of matrices then")
    for dim in (3, 4):
        shape = (5, 3, 2, 2)[:dim]
        (conv,) = parameters(shapes=[shape])
        flat = nn.Parameter(conv.detach().flatten(1).clone())
        for p in (conv, flat):
            optimizer = Optimizer([([p], transform)], lr=0.1)
            for step in range(6):
                generator = torch.Generator().manual_seed(step)
                p.grad = torch.randn(flat.shape, generator=generator, dtype=p.dtype).view(p.shape)
                optimizer.step()
        torch.testing.assert_close(conv.detach().flatten(1), flat.detach(), rtol=1e-12, atol=1e-12)


def test_states_are_loaded_without_their_empty_parts():
    """Which torch's flattened states of distributed checkpoints leave out."""

    def pruned(state: Any) -> Any:
        if not isinstance(state, dict):
            return state
        return {key: pruned(value) for key, value in state.items() if value != {}}

    one, two = parameters(shapes=[(3, 6, 9)]), parameters(shapes=[(3, 6, 9)])
    first, second = (Optimizer([(p, optimizers.batched(muon()))], lr=0.1) for p in (one, two))
    for optimizer in (first, second):
        trained(optimizer, range(3))
    saved = second.state_dict()
    again = Optimizer([(two, optimizers.batched(muon()))], lr=0.1)
    again.load_state_dict({**saved, "state": pruned(saved["state"])})
    for optimizer in (first, again):
        trained(optimizer, range(3, 5))
    same(one, two)


@pytest.mark.parametrize("block", [pytest.param(1, marks=pytest.mark.slow), 2**24])
def test_slices_of_a_batched_parameter_step_as_parameters_of_their_own(
    transform: Transform, block: int, monkeypatch: pytest.MonkeyPatch
):
    """At the place of the parameter; in one stack with another and alone, all together and one by one."""
    monkeypatch.setattr("rankwise.core.stored.BLOCK", block)
    twins = parameters(shapes=[(3, 6, 9), (3, 6, 9)])
    apart = [[nn.Parameter(p[i].detach().clone()) for p in twins] for i in range(3)]
    for size in (0, 2**22):
        whole = Optimizer([(twins, optimizers.batched(transform))], lr=0.05, weight_decay=0.1, stack_bytes=size)
        others = [Optimizer([(slices, transform)], lr=0.05, weight_decay=0.1) for slices in apart]
        for step in range(1, 6):
            give_gradients(twins, step)
            for i, slices in enumerate(apart):
                for p, part in zip(twins, slices, strict=True):
                    assert p.grad is not None
                    part.grad = p.grad[i].clone()
            for optimizer in (whole, *others):
                optimizer.step()
        for i, slices in enumerate(apart):
            same([p[i] for p in twins], slices, rtol=1e-8, atol=1e-9)


def test_stacks_of_slices_in_any_order_in_memory_are_stepped():
    shapes = [nn.Parameter(draw(6, 3, 9, seed=i).transpose(0, 1)) for i in range(2)]
    plain = [nn.Parameter(p.detach().contiguous()) for p in shapes]
    for params in (shapes, plain):
        optimizer = Optimizer([(params, optimizers.batched(optimizers.weight_norm()))], lr=0.1)
        for step in range(3):
            give_gradients(params, step)
            optimizer.step()
    same(shapes, plain, rtol=1e-9, atol=1e-9)


def test_a_slice_without_a_gradient_waits_for_its_first():
    """As an expert that no token reached: its basis is that of its first gradient that is not zero."""
    p, q = nn.Parameter(torch.zeros(2, 6, 9).double()), nn.Parameter(torch.zeros(6, 9).double())
    transform = galore(rank=2, every=100, projector=Svd())
    one, two = Optimizer([([p], optimizers.batched(transform))], lr=0.1), Optimizer([([q], transform)], lr=0.1)
    for step in range(4):
        p.grad = torch.stack([draw(6, 9, seed=step), draw(6, 9, seed=9 + step) * (step > 1)])
        one.step()
        if step > 1:
            q.grad = p.grad[1].clone()
            two.step()
    slices, alone = (leaves(state["subspace"]["basis"]) for state in (one.state[p]["slices"], two.state[q]))
    for several, single in zip(slices, alone, strict=True):
        torch.testing.assert_close(several[1], single)


@pytest.mark.parametrize("name", ["Svd", "WarmPower", "Cosine", "LargestRows", "Packed", "Randomised"])
def test_a_gradient_of_zeros_takes_no_basis_away(name: str):
    """When a new one is due, which the next gradient gets a period later."""
    p = nn.Parameter(torch.zeros(6, 9).double())
    made = project(getattr(projectors, name)(), adam(), rank=2, every=Every(3, together=True))
    optimizer, changed = Optimizer([([p], made)], lr=0.1), []
    for step in range(7):
        before = [leaf.clone() for leaf in leaves(optimizer.state[p]["subspace"]["basis"])] if step else []
        p.grad = draw(6, 9, seed=step) * (step != 3)
        optimizer.step()
        after = leaves(optimizer.state[p]["subspace"]["basis"])
        changed.append(step == 0 or not all(map(torch.equal, before, after)))
    assert changed == [True, False, False, False, False, False, True]


def test_slices_of_a_parameter_are_reduced_together():
    """In all steps but those of a refresh, however many they are."""
    p = nn.Parameter(torch.zeros(16, 6, 9))
    optimizer = Optimizer([([p], optimizers.batched(galore(rank=2, every=5)))], lr=0.1)
    reduced = []
    for step in range(11):
        p.grad = draw(16, 6, 9, seed=step).float()
        reduced.append(optimizer.reduce_one(p) is not None)
        optimizer.step()
    assert sum(reduced) == 8


def test_transposed_is_the_transpose(transform: Transform):
    (p,) = parameters(shapes=[(6, 9)])
    q = nn.Parameter(p.detach().mT.contiguous())
    one = Optimizer([([p], transform)], lr=0.05, weight_decay=0.1)
    two = Optimizer([([q], optimizers.transposed(transform))], lr=0.05, weight_decay=0.1)
    for step in range(1, 7):  # the gradient of step 0 is p itself, which leaves weight_norm nothing but rounding
        give_gradients([p], step)
        assert p.grad is not None
        q.grad = p.grad.mT.contiguous()
        one.step()
        two.step()
    same([p], [q.mT], rtol=1e-8, atol=1e-9)


@pytest.mark.slow
def test_states_in_few_bits_hold_no_weights(transform: Transform):
    """Steps of length zero leave parameters where those with the whole state do."""
    if isinstance(transform, Batched):
        pytest.skip("it stands outermost")
    if any(isinstance(part, Quantised) for part in (transform, *within(transform))):
        pytest.skip("its states are in few bits already")
    ends = []
    for made in (transform, quantised(transform, least=1)):
        ends.append(parameters())
        trained(Optimizer([(ends[-1], made)], lr=0.0), range(4))
    same(*ends, rtol=1e-9, atol=1e-12)


def test_nothing_stands_around_batched():
    p = nn.Parameter(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="outermost"):
        Optimizer([([p], chain(optimizers.batched(sgd()), sign()))], lr=0.1)


def test_stacked_is_one_by_one(transform: Transform):
    """Also where some have no gradient at times, so that stacks change."""
    without = {2: (0, 5), 3: (1,), 7: (0, 1, 2)}
    runs = []
    for size in (0, 2**22):
        params = parameters()
        optimizer = Optimizer([(params, transform)], lr=0.05, weight_decay=0.1, stack_bytes=size)
        trained(optimizer, range(9), without)
        runs.append((params, optimizer.state_dict()))
    same(runs[0][0], runs[1][0], rtol=1e-9, atol=1e-9)
    assert runs[0][1]["param_groups"] == runs[1][1]["param_groups"]
    for number, state in runs[0][1]["state"].items():
        other = runs[1][1]["state"][number]
        map_state(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9), state, other)
        assert [leaf.dtype for leaf in leaves(state)] == [leaf.dtype for leaf in leaves(other)]


@pytest.mark.slow
def test_a_hook_may_step_each_parameter_when_its_gradient_is_there(transform: Transform):
    one, two = parameters(), parameters()
    whole, single = (Optimizer([(p, transform)], lr=0.05, weight_decay=0.1) for p in (one, two))
    for step in range(5):
        give_gradients(one, step)
        give_gradients(two, step)
        whole.step()
        for p in reversed(two):
            single.step_one(p)
            p.grad = None
    same(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_gradients_may_be_added_up_in_reduced_form(transform: Transform):
    """As layer-wise steps add them up, in the middle and at the turn of periods of refreshes."""
    one, two = parameters(), parameters()
    whole, single = (Optimizer([(p, transform)], lr=0.05, weight_decay=0.1) for p in (one, two))
    with Layerwise(single, accumulate=3):
        for step in range(9):
            sums = [torch.zeros_like(p) for p in one]
            for part in range(3):
                give_gradients(one, 3 * step + part)
                grads = [p.grad for p in one if p.grad is not None]
                for total, grad in zip(sums, grads, strict=True):
                    total += grad
                torch.autograd.backward([(p * grad).sum() for p, grad in zip(two, grads, strict=True)])
            for p, total in zip(one, sums, strict=True):
                p.grad = total
            whole.step()
            single.step()
    same(one, two, rtol=1e-8, atol=1e-9)


def test_a_missing_gradient_leaves_parameter_and_state(transform: Transform):
    params = parameters()
    optimizer = Optimizer([(params, transform)], lr=0.1, weight_decay=0.5)
    trained(optimizer, range(2))
    value, state = params[0].detach().clone(), copy.deepcopy(optimizer.state[params[0]])
    trained(optimizer, range(2, 4), {2: (0,), 3: (0,)})
    torch.testing.assert_close(params[0].detach(), value, rtol=0, atol=0)
    map_state(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), state, optimizer.state[params[0]])


def test_zero_gradients_keep_all_finite(transform: Transform):
    params = parameters(torch.float32)
    optimizer = Optimizer([(params, transform)], lr=0.1)
    for step in range(4):
        give_gradients(params, step)
        for p in params:
            if p.grad is not None and step != 2:
                p.grad.zero_()
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in params)


def test_a_gradient_that_is_not_finite_changes_nothing(transform: Transform):
    params, names = parameters(torch.float32), [f"p{i}" for i in range(len(SHAPES))]
    optimizer = Optimizer([(list(zip(names, params, strict=True)), transform)], lr=0.1, weight_decay=0.1)
    trained(optimizer, range(2))
    give_gradients(params, 3)
    values, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
    assert params[4].grad is not None
    for value in (float("nan"), float("inf"), -float("inf"), 1e20):
        params[4].grad.view(-1)[7] = value
        with pytest.raises(FloatingPointError, match=r"gradient of p4 .* not finite; nothing was changed"):
            optimizer.step()
        for p, before in zip(params, values, strict=True):
            assert torch.equal(p, before)
        now = optimizer.state_dict()["state"]
        for number, before in state["state"].items():
            assert all(map(torch.equal, leaves(before), leaves(now[number])))
    params[4].grad.zero_()
    optimizer.step()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def test_states_are_as_long_as_was_said(transform: Transform, dtype: torch.dtype):
    """Counted without a step, beside what stands after one; states beside half precision are float32."""
    params = parameters(dtype)
    optimizer = Optimizer([(params, transform)], lr=0.1)
    predicted = optimizer_bytes(optimizer)
    trained(optimizer, range(2))
    kept = [leaf for state in optimizer.state.values() for leaf in leaves(state)]
    assert predicted == sum(leaf.nbytes for leaf in kept)
    assert not any(leaf.dtype in (torch.bfloat16, torch.float16) for leaf in kept)


def test_a_transform_has_a_name_in_plain_data(transform: Transform):
    data = described(transform)
    assert data["kind"] == type(transform).__name__
    assert described(pickle.loads(pickle.dumps(transform))) == data
    hash(transform)


def compositions() -> list[Any]:
    """Each projector with each inner transform; each of them with each rule of refresh and of carrying."""
    inner = {"adam": adam(), "sgd": sgd(beta=0.9), "adafactor": adafactor()}
    rules = {"every": Every(3), "together": Every(4, together=True), "drop": EnergyDrop(steps=2, below=0.99)}
    carries = itertools.cycle([Keep(), Reset()])
    names = [
        "Cosine",
        "LargestRows",
        "Packed",
        "RandomOrthogonal",
        "RandomRows",
        "Randomised",
        "RowBlock",
        "Svd",
        "WarmPower",
    ]
    cells = []
    for (i, name), (j, (inside, inner_)) in itertools.product(enumerate(names), enumerate(inner.items())):
        (when, rule), carry = [*rules.items()][(i + j) % 3], next(carries)
        made = project(getattr(projectors, name)(), inner_, rank=2, every=rule, carry=carry)
        cells.append(pytest.param(made, id=f"{name}-{inside}-{when}-{type(carry).__name__}"))
    for name in names:
        made = project(getattr(projectors, name)(), adam(), rank=2, every=3, carry=Rotate())
        cells.append(pytest.param(made, id=f"{name}-adam-every-Rotate"))
    for enough in (0.0, 1.0):
        made = project(projectors.Packed(), adam(), rank=2, every=Backoff(2, enough=enough, recent=2))
        cells.append(pytest.param(made, id=f"Packed-adam-Backoff-{enough}"))
    others = [(name, i, each) for name, all_ in SETTINGS.items() for i, each in enumerate(all_)]
    return cells + [pytest.param(each, id=f"{name}-{i}") for name, i, each in others]


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("made", compositions())
def test_stop_save_load_and_go_on_is_exact(made: Transform, dtype: torch.dtype):
    """In mid-period, through a file, with schedulers; the second run never knew the first.

    Some files keep no strides; states are laid out as they were in any case, as other sums round otherwise.
    Some parameters lie in memory column by column.
    """
    shapes, turned = [(6, 9), (6, 9), (9, 6), (7,), ()], [(4, 7), (4, 7), (7, 4)]

    def begin() -> tuple[list[nn.Parameter], Optimizer, Any]:
        params = [*parameters(dtype, shapes), *(nn.Parameter(p.detach().mT) for p in parameters(dtype, turned))]
        optimizer = Optimizer([(params[:2], made), (params[2:], made)], lr=0.05, weight_decay=0.1)
        return params, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    one, first, schedule = begin()
    trained(first, range(5), {1: (0,)})
    schedule.step()
    saved, lr = through_a_file(first), schedule.state_dict()
    two, second, other = begin()
    with torch.no_grad():
        for p, q in zip(two, one, strict=True):
            p.copy_(q)
    for state in saved["state"].values():
        state |= map_state(lambda leaf: leaf.contiguous(), state)
    second.load_state_dict(saved)
    other.load_state_dict(lr)
    for p, q in zip(one, two, strict=True):
        map_state(lambda a, b: same_layout(a, b), first.state[p], second.state[q])
    for optimizer, each in ((first, schedule), (second, other)):
        trained(optimizer, range(5, 12), {8: (1,)})
        each.step()
        trained(optimizer, range(12, 14))
    same(one, two)
    left, right = first.state_dict(), second.state_dict()
    assert left["param_groups"] == right["param_groups"]
    for number, state in left["state"].items():
        map_state(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), state, right["state"][number])


@pytest.mark.slow
def test_a_state_that_was_dropped_begins_again(transform: Transform):
    """As schedules do; the other parameters of its stack go on."""
    params, others = parameters(), parameters()
    one, two = Optimizer([(params, transform)], lr=0.05), Optimizer([(others, transform)], lr=0.05)
    for optimizer in (one, two):
        trained(optimizer, range(3))
    one.state.pop(params[1])
    fresh = Optimizer([(others, transform)], lr=0.05)
    state = two.state_dict()
    del state["state"][1]
    fresh.load_state_dict(state)
    for optimizer in (one, fresh):
        trained(optimizer, range(3, 6))
    same(params, others)
    saved, wanted = one.state_dict()["state"], fresh.state_dict()["state"]
    for number, state in wanted.items():
        map_state(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), state, saved[number])


@pytest.mark.slow
def test_copies_and_pickles_go_on_alone(transform: Transform):
    params = parameters()
    optimizer = Optimizer([(params, transform)], lr=0.05, stack_bytes=1000)
    trained(optimizer, range(3))
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.stack_bytes == 1000
        trained(other, range(3, 6))
        mine = copy.deepcopy(params)
        reference = Optimizer([(mine, transform)], lr=0.05, stack_bytes=1000)
        reference.load_state_dict(optimizer.state_dict())
        trained(reference, range(3, 6))
        same([p for group in other.param_groups for p in group["params"]], mine)


@pytest.mark.slow
def test_what_was_loaded_is_not_shared(transform: Transform):
    params = parameters()
    optimizer = Optimizer([(params, transform)], lr=0.05)
    trained(optimizer, range(2))
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    other = Optimizer([(parameters(), transform)], lr=0.05)
    other.load_state_dict(saved)
    trained(other, range(2, 5))
    for number, state in before["state"].items():
        map_state(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), state, saved["state"][number])


def test_a_state_of_something_else_is_refused():
    saved = Optimizer([(parameters(), galore(rank=2))], lr=0.1)
    trained(saved, range(1))
    state = saved.state_dict()
    with pytest.raises(ValueError, match="state of group 0 belongs to"):
        Optimizer([(parameters(), galore(rank=3))], lr=0.1).load_state_dict(state)
    params = parameters()
    with pytest.raises(ValueError, match="has 1 groups, the optimiser 2"):
        Optimizer([(params[:1], adam()), (params[1:], adam())], lr=0.1).load_state_dict(state)
    with pytest.raises(ValueError, match="parameters"):
        Optimizer([(parameters()[:2], galore(rank=2))], lr=0.1).load_state_dict(state)
    shapes = [(9, 6), *SHAPES[1:-1], (0, 3)]
    shapes[0] = (6, 10)
    with pytest.raises(ValueError, match="state of parameter 0"):
        Optimizer([(parameters(shapes=shapes), galore(rank=2))], lr=0.1).load_state_dict(state)
    del state["state"][0]["subspace"]
    with pytest.raises(ValueError, match="state of parameter 0 has other entries"):
        Optimizer([(parameters(), galore(rank=2))], lr=0.1).load_state_dict(state)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda p: Optimizer([(p, adam())], lr=-1.0), "lr must be a finite number >= 0"),
        (lambda p: Optimizer([(p, adam())], lr=0.1, weight_decay=-1.0), "weight_decay must be a finite"),
        (lambda p: Optimizer([{"params": p}], lr=0.1), "each group needs a transform"),
        (lambda p: Optimizer([p[0]], lr=0.1), "give pairs"),
        (
            lambda p: Optimizer([{"params": p, "transform": adam(), "weigth_decay": 0.1}], lr=0.1),
            r"no entry 'weigth_decay': did you mean weight_decay\?",
        ),
        (
            lambda p: Optimizer([{"params": p, "transform": adam(), "betas": (0.9, 0.9)}], lr=0.1),
            "such as betas, goes into its transform",
        ),
        (lambda p: Optimizer(p[0], lr=0.1), "give pairs"),
        (lambda p: Optimizer([([torch.ones(2, dtype=torch.complex64)], adam())], lr=0.1), "real floating"),
        (lambda p: adam(betas=(0.9, 1.0)), "betas"),
        (lambda p: adam(eps=-1.0), "eps"),
        (lambda p: sgd(beta=1.0), "beta"),
        (lambda p: galore(rank=0), "rank must be above zero"),
        (lambda p: galore(rank=-1), "rank"),
        (lambda p: galore(rank=1.5), "rank"),
        (lambda p: galore(rank=True), "rank"),
        (lambda p: frugal(density=2.0), "density must be a share"),
        (lambda p: frugal(density=2), "density must be a share"),
        (lambda p: frugal(projector=Svd(), entries=True), "RandomRows"),
        (lambda p: frugal(carry=Rotate(), entries=True), "angles"),
        (lambda p: project(RandomRows(), adam(), rank=3, entries=True), "share"),
        (lambda p: galore(rank=2, every=0), "steps"),
        (lambda p: muon(polynomials=()), "polynomials"),
        (lambda p: hybrid_auon(polynomials=()), "polynomials"),
        (lambda p: soap(largest=-5), "largest must be >= 0, got -5"),
        (lambda p: adafactor(least=0.1), "least=0.1 would do nothing"),
        (lambda p: adafactor(decay=0.0), "decay"),
        (lambda p: optimizers.soft_cap(limit=0.0), "limit"),
        (lambda p: optimizers.soft_cap(limit=1.0, step=0.0), "step"),
        (lambda p: optimizers.hard_cap(limit=-1.0), "limit"),
        (lambda p: optimizers.row_cap(limit=float("nan")), "limit"),
        (lambda p: optimizers.spectral_normalize(limit=float("inf")), "limit"),
        (lambda p: optimizers.spectral_hammer(limit=0.0), "limit"),
        (lambda p: optimizers.spectral_hammer(limit=1.0, steps=0), "steps"),
        (lambda p: optimizers.spectral_decay(rate=-1.0), "rate"),
        (lambda p: optimizers.tscnc(sparsity=-1.0), "weight"),
        (lambda p: optimizers.tscnc(sharpness=0.0), "sharpness"),
        (lambda p: optimizers.tscnc(damping=0.0), "damping"),
    ],
)
def test_bad_arguments_are_refused(make: Any, text: str):
    with pytest.raises(ValueError, match=text):
        make(parameters())


def test_states_that_cannot_be_carried_are_refused_at_once():
    optimizer = Optimizer([(parameters(), galore(rank=2, inner=adafactor(), carry=Rotate()))], lr=0.1)
    with pytest.raises(ValueError, match="FactoredScale cannot be carried"):
        trained(optimizer, range(1))


def test_a_state_that_cannot_begin_changes_nothing():
    """A zero matrix has no scale; it may come after others, and is mended before the next step."""
    params = parameters(shapes=[(7,), (6, 9), (4, 5)])
    values = params[2].detach().clone()
    with torch.no_grad():
        params[2].zero_()
    optimizer = Optimizer([([p], optimizers.stiefel()) for p in params], lr=0.1)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="a matrix is zero"):
        trained(optimizer, range(1))
    same(params, before)
    assert not any(optimizer.state[p] for p in params)
    with torch.no_grad():
        params[2].copy_(values)
    trained(optimizer, range(1))
    whole = parameters(shapes=[(7,), (6, 9), (4, 5)])
    trained(Optimizer([([p], optimizers.stiefel()) for p in whole], lr=0.1), range(1))
    same(params, whole)


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = Optimizer([(embedding.parameters(), adam())], lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        optimizer.step()


@dataclass(frozen=True)
class Replaces(Transform):
    """A transform that replaces an entry of its state, which would be lost."""

    def init(self, param: Tensor, index: Tensor) -> Any:
        return {"sum": torch.zeros_like(param)}

    def update(self, grad: Tensor, state: Any, param: Tensor) -> Tensor:
        state["sum"] = state["sum"] + grad
        return grad


def test_states_are_written_into_not_replaced():
    with pytest.raises(TypeError, match="does not support item assignment"):
        trained(Optimizer([(parameters(), Replaces())], lr=0.1), range(1))


@dataclass(frozen=True)
class Shrinks(Transform):
    """Reads parameters, and says so or not."""

    says: bool

    @property
    def reads_param(self) -> bool:
        return self.says

    def update(self, grad: Tensor, state: Any, param: Tensor) -> Tensor:
        return grad + param


@pytest.mark.parametrize("size", [0, 2**22])
def test_who_reads_parameters_says_so(size: int):
    params = parameters()
    before = [p.detach().clone() for p in params]
    made = by_shape(matrix=wide(chain(Shrinks(True), sgd())), other=Shrinks(True))
    optimizer = Optimizer([(params, made)], lr=0.1, stack_bytes=size)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, value in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), 0.9 * value)
    silent = Optimizer([(parameters(), Shrinks(False))], lr=0.1, stack_bytes=size)
    with pytest.raises(RuntimeError):
        trained(silent, range(1))


class Plain(Transform):
    """Not a dataclass, so a state could not say what it belongs to."""

    def update(self, grad: Tensor, state: Any, param: Tensor) -> Tensor:
        return grad


def test_transforms_are_dataclasses():
    with pytest.raises(ValueError, match="plain values or dataclasses"):
        Optimizer([(parameters(), Plain())], lr=0.1)


@dataclass(frozen=True)
class Bounded(Transform):
    """Holds parameters in a box that shrinks with lr."""

    @property
    def constrains(self) -> bool:
        return True

    def update(self, grad: Tensor, state: Any, param: Tensor) -> Tensor:
        return grad

    def constrain(self, param: Tensor, state: Any, lr: float, weight_decay: float) -> Tensor:
        return param.clamp(-lr - weight_decay, lr + weight_decay)


@pytest.mark.parametrize("size", [0, 2**22])
def test_constraints_hold_after_steps(size: int):
    params = parameters()
    made = by_shape(matrix=wide(chain(sgd(), Bounded())), other=adam())
    trained(Optimizer([(params, made)], lr=0.1, weight_decay=0.05, stack_bytes=size), range(2))
    for p in params:
        assert p.ndim < 2 or p.numel() == 0 or float(p.detach().abs().max()) == pytest.approx(0.15)
        assert p.ndim >= 2 or float(p.detach().abs().max()) > 0.15


def test_other_roundings_may_be_given():
    class Upwards(Write):
        def __call__(self, params: Any, directions: Any, keep: float, factor: float, state: Any) -> None:
            for p, d in zip(params, directions, strict=True):
                assert d.dtype == torch.float32
                p.copy_((keep * p.float() + factor * d).ceil())

    (weight,) = parameters(torch.bfloat16, [(3, 3)])
    trained(Optimizer([([weight], sgd())], lr=0.1, write=Upwards()), range(1))
    assert torch.equal(weight, weight.detach().round())


def test_groups_can_be_added_and_have_their_own_numbers():
    params = parameters()
    optimizer = Optimizer([(params[:3], adam())], lr=0.1)
    trained(optimizer, range(2))
    optimizer.add_param_group({"params": params[3:], "transform": muon(), "lr": 0.0})
    values = [p.detach().clone() for p in params]
    give_gradients(params, 5)
    optimizer.step()
    for i, (p, value) in enumerate(zip(params, values, strict=True)):
        assert torch.equal(p, value) == (i >= 3)
    with pytest.raises(ValueError, match="more than one"):
        optimizer.add_param_group((params[:1], adam()))
    assert len(optimizer.param_groups) == 2
    with pytest.raises(ValueError, match="lr"):
        optimizer.add_param_group({"params": parameters(), "transform": adam(), "lr": -1.0})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize(
    "begin",
    [
        lambda optimizer, last: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.2, total_steps=9, cycle_momentum=False, last_epoch=last
        ),
        lambda optimizer, last: torch.optim.lr_scheduler.StepLR(optimizer, 2, last_epoch=last),
        lambda optimizer, last: torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.02, last_epoch=last),
    ],
    ids=["one cycle", "steps", "averages"],
)
def test_what_schedulers_note_in_groups_can_be_given_again(begin: Any):
    params = parameters()
    first = Optimizer([(params, adam())], lr=0.1)
    schedule = begin(first, -1)
    trained(first, range(2))
    schedule.step()
    again = Optimizer(copy.copy(first.param_groups), lr=0.1)
    begin(again, 1)
    again.load_state_dict(first.state_dict())


def test_closures_see_gradients_switched_on():
    (weight,) = parameters(shapes=[(3, 3)])
    optimizer = Optimizer([([weight], adam())], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        first = optimizer.step(closure)
        assert float(optimizer.step(closure)) < float(first)


def test_layers_take_turns():
    """However many there are, fits are spread evenly over a period."""
    for count in (4, 30, 100):
        turns = Every(100).init(torch.arange(count))["turn"]
        found = torch.bincount(turns // 10, minlength=10)
        assert int(found.max()) <= -(-count // 10) + 2
    assert Every(100, together=True).init(torch.arange(3))["turn"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("size", [0, 2**22])
def test_parameters_know_their_places(size: int):
    """Over all groups, added ones too: turns and random subspaces are those of the place, stacked or not."""
    made = project(RandomOrthogonal(), adam(), rank=2, every=100)
    params = parameters(shapes=[(6, 9)] * 5)
    optimizer = Optimizer([(params[:2], made), (params[2:4], made)], lr=0.1, stack_bytes=size)
    optimizer.add_param_group((params[4:], made))
    trained(optimizer, range(1))
    states = [optimizer.state[p]["subspace"] for p in params]
    assert [int(state["refresh"]["turn"]) for state in states] == Every(100).init(torch.arange(5))[
        "turn"
    ].tolist()
    assert [int(state["basis"]["index"]) for state in states] == list(range(5))
    assert len({tuple(state["basis"]["rows"].tolist()) for state in states}) > 1


def fits_of(rule: Any, gradients: list[Tensor]) -> list[int]:
    """The steps at which the basis of one parameter changed."""
    weight = nn.Parameter(torch.zeros_like(gradients[0]))
    made = project(LargestRows(), sgd(), rank=2, every=rule)
    optimizer = Optimizer([([weight], made)], lr=0.0)
    steps, rows = [], None
    for step, grad in enumerate(gradients, 1):
        weight.grad = grad
        optimizer.step()
        now = optimizer.state[weight]["subspace"]["basis"]["rows"].clone()
        if rows is not None and not torch.equal(now, rows):
            steps.append(step)
        rows = now
    return steps


def rows_of(*rows: int) -> Tensor:
    grad = torch.full((6, 8), 0.1).double()
    grad[list(rows)] = 1.0
    return grad


def test_a_basis_is_fitted_when_it_is_due():
    moving = [rows_of(i % 6, (i + 1) % 6) for i in range(20)]
    assert fits_of(Every(5), moving) == [6, 11, 16]


def test_a_basis_is_fitted_when_it_holds_less():
    stay, move = [rows_of(0, 1)] * 9, [rows_of(3, 4)] * 9
    assert fits_of(EnergyDrop(steps=4, below=0.5), stay + move) == [13]


def test_carrying_by_rotation_keeps_a_momentum_that_stays_inside():
    """In a subspace that holds all gradients, rotated momentum is momentum outside of any subspace."""
    left = torch.linalg.qr(draw(8, 3)).Q
    weights = [nn.Parameter(torch.zeros(8, 12).double()) for _ in range(3)]
    kinds = [
        project(Svd(), sgd(beta=0.9), rank=3, every=2, carry=Rotate()),
        sgd(beta=0.9),
        project(Svd(), sgd(beta=0.9), rank=3, every=2, carry=Keep()),
    ]
    all_ = [Optimizer([([w], kind)], lr=0.1) for w, kind in zip(weights, kinds, strict=True)]
    for step in range(9):
        for w, optimizer in zip(weights, all_, strict=True):
            w.grad = left @ draw(3, 12, seed=step)
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-9, atol=1e-9)
    assert float((weights[2] - weights[1]).detach().norm()) > 0.1 * float(
        weights[1].detach().norm()
    )  # it does matter


def test_a_permutation_carries_adam_exactly():
    """Rotation by signs and a permutation is exact for the mean; squares follow the permutation."""
    kind, grads = adam(), [draw(4, 6, seed=i)[None] for i in range(5)]
    order = torch.tensor([2, 0, 3, 1])
    turn = torch.eye(4).double()[order][None]
    state, other = ({k: v for k, v in kind.init(grads[0], torch.tensor([0])).items()} for _ in range(2))
    for grad in grads:
        kind.update(grad, state, grad)
        kind.update(turn @ grad, other, grad)
    kind.rotate(state, turn)
    for name in ("mean", "square"):
        torch.testing.assert_close(state[name], other[name], rtol=1e-9, atol=1e-12)


def test_reset_begins_again():
    """After each fit, what runs inside has no memory: with sgd of momentum it is sgd at these steps."""
    inner = sgd(beta=0.9)
    made = project(RandomOrthogonal(), inner, rank=4, every=1, carry=Reset())
    (one,), (two,) = (parameters(shapes=[(6, 9)]) for _ in range(2))
    for p, kind in ((one, made), (two, project(RandomOrthogonal(), sgd(), rank=4, every=1))):
        trained(Optimizer([([p], kind)], lr=0.1), range(6))
    same([one], [two], rtol=1e-12, atol=1e-12)


def test_it_works_with_a_scaler_and_accelerate():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4))
    optimizer = Optimizer([(model.parameters(), galore(rank=2, every=2))], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    wrapped, prepared, schedule = Accelerator(cpu=True).prepare(model, optimizer, schedule)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        wrapped(torch.ones(2, 8)).square().mean().backward()
        prepared.step()
        schedule.step()
        prepared.zero_grad()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.125)
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    prepared.load_state_dict(prepared.state_dict())


def test_a_scaler_leaves_out_steps_that_overflow():
    (weight,) = parameters(torch.float32, [(4, 4)])
    optimizer = Optimizer([([weight], adam())], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    value = weight.detach().clone()
    scaler.scale(weight.sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(weight.detach(), value, rtol=0, atol=0)
    optimizer.zero_grad()
    scaler.scale(weight.square().sum()).backward()
    scaler.step(optimizer)
    assert not torch.equal(weight, value)


def test_it_is_exported():
    assert rankwise.Optimizer is Optimizer
    assert rankwise.optimizers is optimizers


@pytest.mark.parametrize(("name", "field"), [("apollo", "scale"), ("aro", "scale"), ("frugal", "free_scale")])
def test_a_scale_that_is_no_number_is_refused(name: str, field: str):
    """Else the first step would write it into all weights."""
    with pytest.raises(ValueError, match="scale must be a finite number"):
        getattr(optimizers, name)(**{field: math.nan}, **({"rank": 2} if name == "apollo" else {}))
