"""Steps inside the backward pass are the ordinary steps, with fewer gradients in memory."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import ids, llama
from torch import Tensor, nn

from rankwise import Layerwise, Optimizer
from rankwise.core.stepping import Whole
from rankwise.core.transforms import Transform
from rankwise.optimizers import adam, frugal, galore, muon, sgd
from rankwise.projectors import EnergyDrop

KINDS: dict[str, Transform] = {
    "adam": adam(),
    "frugal": frugal(every=3),
    "galore": galore(rank=4, every=3),
    "looked at": galore(rank=4, every=EnergyDrop(steps=2, below=0.99)),
    "muon": muon(),
}


@pytest.fixture(params=KINDS.values(), ids=list(KINDS))
def transform(request: pytest.FixtureRequest) -> Transform:
    return request.param


def made(transform: Transform, dtype: torch.dtype = torch.float64, **changes: Any) -> tuple[Any, Optimizer]:
    """A model and its optimiser, which stacks nothing, so that the sums are in the same order."""
    model = llama(initializer_range=0.2, **changes).to(dtype).train()
    return model, Optimizer([(model.named_parameters(), transform)], lr=0.01, weight_decay=0.1, stack_bytes=0)


def loss_of(model: nn.Module, part: Tensor) -> Tensor:
    return model(input_ids=part, labels=part).loss


def batches() -> list[Tensor]:
    return list(ids()[:, :10].split(1))


def run(
    model: Any,
    optimizer: Optimizer,
    step: Callable[[list[Callable[[], Tensor]]], None],
    accumulate: int = 1,
    scheduled: bool = True,
) -> list[Tensor]:
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.8**i)
    data = batches()
    for low in range(0, 6 * accumulate, accumulate):
        step([lambda part=part: loss_of(model, part) / accumulate for part in data[low : low + accumulate]])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def ordinary(
    transform: Transform, accumulate: int = 1, clip: float | None = None, **changes: Any
) -> list[Tensor]:
    model, optimizer = made(transform, **changes)

    def step(losses: list[Callable[[], Tensor]]) -> None:
        for loss in losses:
            loss().backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)

    return run(model, optimizer, step, accumulate)


def layer_by_layer(
    transform: Transform, accumulate: int = 1, clip: float | None = None, **changes: Any
) -> list[Tensor]:
    model, optimizer = made(transform, **changes)
    layers = Layerwise(optimizer, accumulate=accumulate, clip=clip)

    def step(losses: list[Callable[[], Tensor]]) -> None:
        for loss in losses:
            if clip is None:
                loss().backward()
            else:
                layers.backward(loss)
        assert all(p.grad is None for p in model.parameters())

    return run(model, optimizer, step, accumulate)


def assert_same(one: list[Tensor], two: list[Tensor], **close: float) -> None:
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, **(close or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_it_is_the_ordinary_step_bit_by_bit(transform: Transform, dtype: torch.dtype):
    """With tied embeddings, which get gradients from both ends, and a schedule of the learning rate."""
    assert_same(layer_by_layer(transform, dtype=dtype), ordinary(transform, dtype=dtype))


def test_clipping_is_that_of_torch_bit_by_bit(transform: Transform):
    """Also with dropout: both passes draw the same."""
    options: dict[str, Any] = {"clip": 0.5, "attention_dropout": 0.3}
    results = []
    for way in (layer_by_layer, ordinary):
        torch.manual_seed(3)
        results.append(way(transform, **options))
    assert_same(*results)
    assert not torch.equal(results[0][0], ordinary(transform, attention_dropout=0.3)[0])


def test_accumulated_gradients_are_added_up(transform: Transform):
    """In the projected space the sum of projections is the projection of the sum, but for rounding."""
    assert_same(layer_by_layer(transform, 2), ordinary(transform, 2), rtol=1e-9, atol=1e-11)


def peak_bytes(transform: Transform, how: dict[str, Any] | None) -> list[int]:
    """The most bytes of gradients that stood beside each other at each step, seen whenever one comes."""
    model, optimizer = made(transform, torch.float32, num_hidden_layers=6, vocab_size=64)
    peak = [0]
    layers = None

    def look(_: Tensor) -> None:
        held = [p.grad for p in model.parameters() if p.grad is not None]
        sums = [] if layers is None else list(layers._sums.values())
        peak[-1] = max(peak[-1], sum(each.nbytes for each in (*held, *sums)))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(look)
    layers = None if how is None else Layerwise(optimizer, **how)
    count = 1 if how is None else how.get("accumulate", 1)
    data = batches()
    for i in range(4):
        for part in data[i * count : (i + 1) * count]:
            loss_of(model, part).backward()
        optimizer.step()
        optimizer.zero_grad()
        peak.append(0)
    return peak[:-1]


def test_one_gradient_at_a_time(transform: Transform):
    model, _ = made(transform, torch.float32, num_hidden_layers=6)
    sizes = [p.nbytes for p in model.parameters()]
    assert max(peak_bytes(transform, None)) == sum(sizes)
    assert max(peak_bytes(transform, {})) == max(sizes)


def test_accumulated_projections_are_small():
    """Once each basis is there: of matrices only rank by the longer side, and the whole of the others."""
    model, _ = made(KINDS["galore"], torch.float32, num_hidden_layers=6)
    shapes = [p.shape for p in model.parameters()]
    whole = sum(4 * shape.numel() for shape in shapes)
    low = sum(4 * (4 * max(shape) if len(shape) == 2 else shape.numel()) for shape in shapes)
    bound = low + max(4 * shape.numel() for shape in shapes)
    peaks = peak_bytes(galore(rank=4, every=1000), {"accumulate": 2})
    assert peaks[0] > 0.9 * whole  # the first step needs all, to fit the bases
    assert max(peaks[1:]) <= bound < 0.4 * whole
    assert min(peak_bytes(muon(), {"accumulate": 2})) == whole


def test_a_matrix_whose_basis_is_due_is_added_up_whole():
    weight = nn.Parameter(torch.zeros(6, 9))
    optimizer = Optimizer([([weight], galore(rank=2, every=2))], lr=0.1)
    layers, reduced = Layerwise(optimizer, accumulate=2), []
    for step in range(5):
        for part in range(2):
            torch.manual_seed(2 * step + part)
            (weight * torch.randn(6, 9)).sum().backward()
            if part == 0:
                reduced.append(weight.grad is None)
        optimizer.step()
    assert len(layers._sums) == 0
    assert reduced == [False, True, False, True, False]


def test_what_gets_fewer_gradients_is_stepped_at_the_end():
    """A layer that some backward passes do not reach, as experts of a mixture."""
    results = []
    for how in (None, {"accumulate": 2}):
        torch.manual_seed(0)
        one, two = nn.Linear(6, 8).double(), nn.Linear(6, 8).double()
        optimizer = Optimizer([([*one.parameters(), *two.parameters()], galore(rank=2, every=100))], lr=0.1)
        if how is not None:
            Layerwise(optimizer, **how)
        x = torch.randn(4, 6).double()
        for _ in range(4):
            one(x).square().sum().backward()
            (one(x).square().sum() + two(x).square().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach() for p in (*one.parameters(), *two.parameters())])
    assert_same(*results, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", [sgd(), galore(rank=2, every=3)], ids=["sgd", "galore"])
def test_gradients_of_a_step_are_none_of_the_next(kind: Transform):
    """Of a branch that gets fewer than the others, and of what trains only since later."""

    def end(how: Callable[[Optimizer], Any]) -> list[Tensor]:
        torch.manual_seed(0)
        trunk, branch, late = (nn.Linear(6, 8).double() for _ in range(3))
        late.requires_grad_(False)
        params = [p for layer in (trunk, branch, late) for p in layer.parameters()]
        stepping = how(Optimizer([(params, kind)], lr=0.1))
        late.requires_grad_(True)
        for x in torch.randn(5, 4, 6).double():
            stepping.take([lambda x=x: trunk(x).square().sum(), lambda x=x: (branch(x) * late(x)).sum()])
        return [p.detach() for p in params]

    assert_same(end(Layerwise), end(lambda optimizer: Whole(optimizer, None)), rtol=1e-9, atol=1e-11)


def test_it_ends_and_drops():
    model, optimizer = made(adam())
    before = copy.deepcopy(model.state_dict())
    with Layerwise(optimizer, accumulate=2) as layers:
        loss_of(model, batches()[0]).backward()
        layers.discard()
        assert all(p.grad is None for p in model.parameters())
    loss_of(model, batches()[0]).backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is not None for p in model.parameters())


def test_numbers_that_are_not_finite():
    """With clip nothing changes; without, other parameters may have, and the error says so."""
    for clip in (1.0, None):
        first, last = (nn.Parameter(torch.ones(3)) for _ in range(2))
        optimizer = Optimizer([([("first", first), ("last", last)], adam())], lr=0.1)
        layers = Layerwise(optimizer, clip=clip)

        def loss(first: Tensor = first, last: Tensor = last) -> Tensor:
            hidden = first.clone()
            hidden.register_hook(lambda grad: grad * float("nan"))
            return (hidden * last).sum()

        if clip is None:
            with pytest.raises(FloatingPointError, match=r"gradient of first .* may have been stepped already"):
                loss().backward()
            assert not torch.equal(last, torch.ones(3))
        else:
            assert layers.take([loss]) == (3.0, False)
            assert torch.equal(first, torch.ones(3))
            assert torch.equal(last, torch.ones(3))
        assert layers.take([lambda first=first: first.sum() * float("inf")])[1] is False


def test_gradients_whose_squares_overflow_are_passed_over():
    weight = nn.Parameter(torch.ones(3))
    whole = Whole(torch.optim.Adam([weight], lr=0.1), clip=1.0)
    assert whole.take([lambda: 1e20 * weight.sum()])[1] is False
    assert torch.equal(weight, torch.ones(3))
    assert whole.take([lambda: 1e10 * weight.sum()])[1] is True


def test_a_loop_that_does_not_end_its_steps_is_told():
    model, optimizer = made(adam())
    Layerwise(optimizer)
    loss_of(model, batches()[0]).backward()
    with pytest.raises(RuntimeError, match=r"2 gradients, but a step takes 1; call optimizer.step\(\)"):
        loss_of(model, batches()[0]).backward()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_after_a_failure_a_saved_state_is_gone_on_with(accumulate: int):
    model, optimizer = made(galore(rank=4, every=3))
    layers = Layerwise(optimizer, accumulate=accumulate)
    start = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    ends = []
    for fails in (False, True):
        if fails:
            poisoned = model.model.layers[0].mlp.up_proj.weight.register_hook(lambda grad: grad * torch.nan)
            with pytest.raises(FloatingPointError, match="go on from the last checkpoint"):
                loss_of(model, batches()[0]).backward()
            poisoned.remove()
        model.load_state_dict(start[0])
        optimizer.load_state_dict(start[1])
        optimizer.zero_grad()
        for part in batches()[:accumulate]:
            loss_of(model, part).backward()
        optimizer.step()
        optimizer.zero_grad()
        ends.append([p.detach().clone() for p in model.parameters()])
    layers.remove()
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_clipping_sees_all_that_trains():
    model, optimizer = made(adam())
    model.lm_head.weight.requires_grad_(False)
    layers = Layerwise(optimizer, clip=1.0)
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="make it again after that"):
        layers.backward(lambda: loss_of(model, batches()[0]))
    layers.remove()
    alone = nn.Parameter(torch.ones(3))
    layers = Layerwise(Optimizer([([alone], adam())], lr=0.1), clip=1.0)
    with pytest.raises(ValueError, match="reaches no parameter"):
        layers.backward(lambda: torch.ones(2, requires_grad=True).sum())


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch):
    _, optimizer = made(adam())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for world in (1, 2):
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda world=world: world)
        if world == 1:
            Layerwise(optimizer).remove()
        else:
            with pytest.raises(ValueError, match="only one process trains"):
                Layerwise(optimizer)


def test_wrong_arguments():
    _, optimizer = made(adam())
    with pytest.raises(ValueError, match="cannot be clipped; leave clip out"):
        Layerwise(optimizer, accumulate=2, clip=1.0)
    with pytest.raises(ValueError, match="accumulate must be >= 1"):
        Layerwise(optimizer, accumulate=0)
    with pytest.raises(ValueError, match="clip must be positive"):
        Layerwise(optimizer, clip=-1.0)
    with pytest.raises(TypeError, match=r"rankwise.Optimizer, got a Adam"):
        Layerwise(torch.optim.Adam([nn.Parameter(torch.ones(1))]))  # type: ignore[arg-type]
    layers = Layerwise(optimizer, clip=1.0)
    with pytest.raises(RuntimeError, match=r"call layers\.backward"):
        next(iter(optimizer.param_groups[0]["params"])).sum().backward()
    with pytest.raises(ValueError, match="sum of 2 backward passes"):
        layers.take([lambda: torch.zeros(()), lambda: torch.zeros(())])
