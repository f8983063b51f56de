"""What every exported preconditioner promises, and what `precondition` promises for any of them."""

import copy
import io
import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

import rankwise
from rankwise import preconditioners
from rankwise.core.checkpoint import load_tree, save_tree
from rankwise.core.conditioning import Conditioning
from rankwise.core.preconditioner import Preconditioner
from rankwise.linalg import Separately, both, exact, expanded, reduced
from rankwise.preconditioners import Ekfac, HyLo, Kfac, MFac, Sngd

METHODS: dict[str, Preconditioner] = {
    "Ekfac": Ekfac(damping=0.5, every=2, early=0),
    "Ekfac, by positions, diagonal sides": Ekfac(damping=0.5, every=1, moments=expanded, largest_side=5),
    "Kfac": Kfac(damping=0.5, factors_every=2, every=4, early=0),
    "Kfac, reduced, diagonal sides": Kfac(damping=0.5, every=1, sharing=reduced, largest_side=5),
    "Kfac, factors damped by their sizes": Kfac(damping=0.5, every=3, solver=Separately()),
    "Kfac, as KAISA": Kfac(damping=0.5, every=1, solver=Separately(share=both), identity_start=True),
    "HyLo, auto": HyLo(damping=0.5, every=2, rank=0.5, window=2, threshold=0.05),
    "HyLo, exact": HyLo(damping=0.5, every=2, mode="exact", sharing=exact),
    "HyLo, kid": HyLo(damping=0.5, every=2, rank=2, mode="kid"),
    "HyLo, kis": HyLo(damping=0.5, every=2, rank=0.5, mode="kis", sharing=exact),
    "MFac": MFac(gradients=4, damping=0.5),
    "MFac, together": MFac(gradients=64, damping=0.5, together=True, mean_over_all=True),
    "Sngd": Sngd(damping=0.5, every=2),
    "Sngd, together": Sngd(damping=0.5, every=2, together=True),
}


def small(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A convolution, a norm and two linear layers, one of them without a bias."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 6, bias=False),
        nn.Tanh(),
        nn.Linear(6, 3),
    ).to(dtype)


def batches(count: int, size: int = 8, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """Small images with labels."""
    rng = Generator().manual_seed(1)
    images = torch.randn(count, size, 2, 4, 4, generator=rng).to(dtype)
    return [*zip(images, torch.randint(0, 3, (count, size), generator=rng), strict=True)]


def run(model: nn.Module, handle: Conditioning, optimizer: torch.optim.Optimizer, data, parts: int = 1) -> None:
    """Train, each batch in some parts."""
    for images, labels in data:
        optimizer.zero_grad()
        for x, y in zip(images.chunk(parts), labels.chunk(parts), strict=True):
            (functional.cross_entropy(model(x), y) / parts).backward()
        assert handle.step()
        optimizer.step()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.fixture(params=METHODS, ids=str)
def method(request) -> Preconditioner:
    return METHODS[request.param]


def test_every_exported_method_has_a_cell():
    exported = {getattr(preconditioners, name) for name in preconditioners.__all__}
    kinds = {kind for kind in exported if isinstance(kind, type) and issubclass(kind, Preconditioner)}
    assert kinds == {type(each) for each in METHODS.values()}


def test_a_handle_says_what_it_is(method: Preconditioner):
    handle = rankwise.precondition(small(), method)
    assert repr(handle) == f"Conditioning({type(method).__name__}, 3 layers, 0 steps)"


def test_the_loss_goes_down(method: Preconditioner):
    model, data = small(), batches(1)[0]
    handle = rankwise.precondition(model, method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = functional.cross_entropy(model(data[0]), data[1]).item()
    run(model, handle, optimizer, [data] * 8)
    assert functional.cross_entropy(model(data[0]), data[1]).item() < 0.95 * before


def test_turned_inputs_and_hidden_units_take_the_turned_steps(method: Preconditioner):
    """At any damping; only diagonal sides know of axes."""
    rng = Generator().manual_seed(1)
    x, y = torch.randn(24, 9, generator=rng).double(), torch.arange(24) % 9  # so that no factor is singular
    q, p = (torch.linalg.qr(torch.randn(n, n, generator=rng).double())[0] for n in (9, 7))
    one = nn.Sequential(nn.Linear(9, 7, bias=False), nn.Linear(7, 9)).double()
    other = copy.deepcopy(one)
    with torch.no_grad():
        other[0].weight.copy_(p @ one[0].weight @ q.mT)
        other[1].weight.copy_(one[1].weight @ p.mT)
    for model, inputs in ((one, x), (other, x @ q.mT)):
        handle, optimizer = rankwise.precondition(model, method), torch.optim.SGD(model.parameters(), lr=0.3)
        run(model, handle, optimizer, [(inputs, y)] * 3)
    error = float((p.mT @ other[0].weight @ q - one[0].weight).detach().abs().max())
    assert error > 1e-6 if getattr(method, "largest_side", 9) < 9 else error < 1e-12


def test_what_is_no_matrix_keeps_its_gradient_and_so_does_what_where_leaves_out(method: Preconditioner):
    model, (images, labels) = small(), batches(1)[0]
    handle = rankwise.precondition(model, method, where=lambda name, layer: name != "4")
    functional.cross_entropy(model(images), labels).backward()
    before = gradients(model)
    handle.step()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, before[name]) == (name in ("1.weight", "1.bias", "4.weight")), name


def test_a_natural_gradient_is_a_direction_of_descent(method: Preconditioner):
    model = small()
    handle = rankwise.precondition(model, method)
    for images, labels in batches(3):
        model.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        before = gradients(model)
        handle.step()
        after = gradients(model)
        assert sum(float((after[name] * before[name]).sum()) for name in before) > 0


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_goes_on_bit_by_bit(method: Preconditioner, stop: int):
    data = batches(6)
    one = small()
    handle, optimizer = (
        rankwise.precondition(one, method),
        torch.optim.SGD(one.parameters(), lr=0.05, momentum=0.9),
    )
    run(one, handle, optimizer, data[:stop])
    file = io.BytesIO()
    torch.save([one.state_dict(), handle.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, curvature, momentum = torch.load(file, weights_only=True)
    run(one, handle, optimizer, data[stop:])

    other = small()
    other.load_state_dict(weights)
    later, again = (
        rankwise.precondition(other, method),
        torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9),
    )
    later.load_state_dict(curvature)
    again.load_state_dict(momentum)
    run(other, later, again, data[stop:])
    same(one, other)


def test_the_state_fits_into_a_checkpoint_and_figures_into_json(method: Preconditioner, tmp_path: Path):
    """Numbers lie in memory as they come back from a file, since rounding depends on it."""
    model = small()
    handle = rankwise.precondition(model, method)
    run(model, handle, torch.optim.SGD(model.parameters(), lr=0.05), batches(2))
    state = handle.state_dict()
    save_tree(state, tmp_path / "state.safetensors")
    found = load_tree(tmp_path / "state.safetensors")
    for block, tensors in state["curvature"].items():
        for name, tensor in tensors.items():
            assert torch.equal(found["curvature"][block].pop(name), tensor)
            assert tensor.is_contiguous(), name
    found.pop("curvature")
    assert found == {name: value for name, value in state.items() if name != "curvature"}
    assert type(method).__name__ in repr(handle)
    assert json.loads(json.dumps(handle.summary()))["phases"] == handle.traffic()


def test_the_bytes_of_the_state_are_predicted(method: Preconditioner):
    """Those of linear layers, but for vectors and single numbers; never more than there are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 20))
    handle = rankwise.precondition(model, method)
    predicted = handle.state_bytes(samples=12, positions=3)
    for _ in range(2):
        model.zero_grad()
        model(torch.randn(12, 3, 20)).square().mean().backward()
        handle.step()
    measured = sum(t.nbytes for tensors in handle.curvature.values() for t in tensors.values())
    assert 0.85 * measured < predicted <= measured


def test_batches_in_parts_are_one_batch(method: Preconditioner):
    data = batches(3)
    found = []
    for parts in (1, 2, 4):
        model = small()
        handle = rankwise.precondition(model, method, seed=3)
        run(model, handle, torch.optim.SGD(model.parameters(), lr=0.05), data, parts)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-9)


def test_batches_may_have_any_size(method: Preconditioner):
    model = small()
    handle = rankwise.precondition(model, method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for size in (8, 1, 5, 3, 1, 1):
        run(model, handle, optimizer, batches(1, size))
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_passed_over_loudly(method: Preconditioner, value: float):
    model, data = small(), batches(4)
    handle = rankwise.precondition(model, method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    run(model, handle, optimizer, data[:1])
    before, kept = copy.deepcopy(model), copy.deepcopy(handle.state_dict())
    optimizer.zero_grad()
    functional.cross_entropy(model(data[1][0] * value), data[1][1]).backward()
    with pytest.warns(RuntimeWarning, match="not finite"):
        assert not handle.step()
    optimizer.step()
    same(model, before)
    after = handle.state_dict()
    assert (after["steps"], after["skipped"]) == (kept["steps"], 1)
    for block, tensors in kept["curvature"].items():
        assert all(torch.equal(after["curvature"][block][name], tensor) for name, tensor in tensors.items())
    run(model, handle, optimizer, data[2:])


def test_a_scaled_loss_changes_nothing(method: Preconditioner):
    images, labels = batches(1)[0]
    found = []
    for scale in (1.0, 1024.0):
        model = small()
        handle = rankwise.precondition(model, method)
        (functional.cross_entropy(model(images), labels) * scale).backward()
        for parameter in model.parameters():
            parameter.grad /= scale
        handle.step(scale=scale)
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-10, atol=1e-12)


def test_a_frozen_layer_is_left_alone_and_one_that_is_not_called_waits(method: Preconditioner):
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.frozen, self.rare = (nn.Linear(4, 4) for _ in range(3))
            self.frozen.requires_grad_(False)

        def forward(self, x: Tensor, rare: bool) -> Tensor:
            x = torch.tanh(self.frozen(torch.tanh(self.first(x))))
            return self.rare(x) if rare else x

    torch.manual_seed(0)
    model = Sometimes().double()
    handle = rankwise.precondition(model, method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    frozen, rare = copy.deepcopy(model.frozen), copy.deepcopy(model.rare)
    for _, called in itertools.product(range(3), (False, True)):
        optimizer.zero_grad()
        model(torch.randn(6, 4, dtype=torch.float64), called).square().mean().backward()
        handle.step()
        optimizer.step()
        same(model.frozen, frozen)
        if called:
            assert not torch.equal(model.rare.weight, rare.weight)
        else:
            same(model.rare, rare)
        rare = copy.deepcopy(model.rare)


def test_half_precision_and_checkpointing_work(method: Preconditioner):
    model, data = small(torch.bfloat16), batches(3, dtype=torch.bfloat16)
    handle = rankwise.precondition(model, method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    run(model, handle, optimizer, data)
    assert all(bool(p.isfinite().all()) and p.dtype == torch.bfloat16 for p in model.parameters())

    found = []
    for recompute in (False, True):
        model, (images, labels) = small(), batches(1)[0]
        handle = rankwise.precondition(model, method)
        tail = model[3:]
        inner = model[:3](images)
        outer = torch.utils.checkpoint.checkpoint(tail, inner, use_reentrant=False) if recompute else tail(inner)
        functional.cross_entropy(outer, labels).backward()
        handle.step()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-12, atol=1e-14)


def test_what_a_copy_of_the_model_does_is_not_seen(method: Preconditioner):
    found = []
    for copied in (False, True):
        model, (images, labels) = small(), batches(1)[0]
        handle = rankwise.precondition(model, method)
        if copied:
            functional.cross_entropy(copy.deepcopy(model)(2 * images[:5]), labels[:5]).backward()
        functional.cross_entropy(model(images), labels).backward()
        handle.step()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


def test_removing_the_handle_takes_all_hooks_off(method: Preconditioner):
    model = small()
    rankwise.precondition(model, method).remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_kl_clip_bounds_the_predicted_change(method: Preconditioner):
    model, (images, labels) = small(), batches(1)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    handle = rankwise.precondition(model, method, kl_clip=1e-3, optimizer=optimizer)
    functional.cross_entropy(model(images), labels).backward()
    before = {name: g for name, g in gradients(model).items() if not name.startswith("1.")}
    handle.step()
    after = gradients(model)
    shortened = sum(float((after[name] * gradient).sum()) for name, gradient in before.items())
    # with v' = nu v: lr^2 nu^2 <v, g> = kl_clip, and what is found is nu <v, g>
    other = small()
    plain = rankwise.precondition(other, method)
    functional.cross_entropy(other(images), labels).backward()
    plain.step()
    free = sum(float((gradients(other)[name] * gradient).sum()) for name, gradient in before.items())
    assert 100 * shortened**2 / free == pytest.approx(1e-3, rel=1e-6)


class TestWrongArguments:
    """What is refused, and in which words."""

    def test_a_weight_used_without_its_module(self, method: Preconditioner):
        class Functional(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.used, self.hidden = nn.Linear(3, 3), nn.Linear(3, 3)

            def forward(self, x: Tensor) -> Tensor:
                return functional.linear(self.used(x), self.hidden.weight)

        model = Functional()
        handle = rankwise.precondition(model, method)
        model(torch.randn(4, 3)).square().mean().backward()
        if method.sees_rows:
            with pytest.raises(ValueError, match="layer hidden has a gradient, but was not called"):
                handle.step()
        else:
            assert handle.step()

    def test_the_state_of_another_method_or_model(self, method: Preconditioner):
        handle = rankwise.precondition(small(), method)
        state = handle.state_dict()
        with pytest.raises(ValueError, match="not of"):
            handle.load_state_dict({**state, "method": {**state["method"], "kind": "Other"}})
        for others in (nn.Sequential(nn.Linear(2, 7)), nn.Sequential(*small(), nn.Linear(2, 2))):
            with pytest.raises(ValueError, match=r"other layers, \d in all: .* \(here "):
                rankwise.precondition(others, method).load_state_dict(state)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"workers": 0.0}, "workers must be"),
            ({"kl_clip": -1.0}, "kl_clip must be"),
            ({"kl_clip": 0.1}, "needs the optimizer"),
            ({"where": lambda name, layer: False}, "no layer was selected"),
        ],
    )
    def test_options(self, method: Preconditioner, options, words: str):
        with pytest.raises(ValueError, match=words):
            rankwise.precondition(small(), method, **options)

    def test_nothing_trains(self, method: Preconditioner):
        with pytest.raises(ValueError, match="none of the 3 layers"):
            rankwise.precondition(small().requires_grad_(False), method)
