"""Preconditioning in loops that are not the simplest ones: what works, and what is refused in which words."""

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from naturals import gradient, natural
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import rankwise
from rankwise.core.conditioned import Conditioned
from rankwise.core.curvatures import Curvatures
from rankwise.core.preconditioner import Preconditioner
from rankwise.linalg import Separately, expanded
from rankwise.preconditioners import Ekfac, HyLo, Kfac, MFac, Sngd

SNGD = Sngd(damping=0.3)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(size: int = 7, seed: int = 1) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(size, 5, generator=rng).double(), torch.arange(size) % 3


def check(model: nn.Module, losses: list[Tensor], damping: float = 0.3) -> None:
    """Every linear layer and convolution has the natural gradient of the mean of these losses."""
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    for layer in layers:
        torch.testing.assert_close(gradient(layer), natural(layer, losses, damping), rtol=1e-9, atol=1e-12)


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    return [functional.cross_entropy(model(a[None]), b[None]) for a, b in zip(x, y, strict=True)]


def stepped(run: Callable[[nn.Module, Tensor, Tensor], Tensor], model: nn.Module | None = None) -> nn.Module:
    """Take the natural gradients of a loss that is made in some way."""
    model = model or net()
    handle = rankwise.precondition(model, SNGD)
    run(model, *batch()).backward()
    assert handle.step()
    handle.remove()
    return model


class Named(nn.Module):
    """Hands its layers what they see by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.spare, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, *, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(input=x))
        self.spare(hidden)  # whose output nobody uses
        return self.last(input=hidden)


def test_layers_called_by_name_and_a_layer_whose_output_is_never_used():
    torch.manual_seed(0)
    model, (x, y) = Named().double(), batch()
    handle = rankwise.precondition(model, SNGD)
    functional.cross_entropy(model(x=x), y).backward()
    handle.step()
    assert model.spare.weight.grad is None
    losses = [functional.cross_entropy(model(x=a[None]), b[None]) for a, b in zip(x, y, strict=True)]
    for layer in (model.first, model.last):
        torch.testing.assert_close(gradient(layer), natural(layer, losses, 0.3))


def test_a_layer_that_waits_does_not_make_the_others_be_looked_at():
    torch.manual_seed(0)
    model, (x, y) = Named().double(), batch()
    handle = rankwise.precondition(model, Sngd(damping=0.3, every=3))
    for _ in range(2):
        functional.cross_entropy(model(x=x), y).backward()
        handle.step()
    assert {*handle.capture.wanted} == {"spare"}


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)),
        nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(-3), nn.Linear(27, 3)),
        nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 3)),
    ],
    ids=["linear", "convolution", "token"],
)
def test_one_sample_without_an_axis_is_a_batch_of_one(model: nn.Sequential):
    x = {nn.Linear: torch.randn(5), nn.Conv2d: torch.randn(2, 4, 4), nn.Embedding: torch.tensor(4)}[
        type(model[0])
    ]
    found = []
    for given in (x, x[None]):
        each = copy.deepcopy(model)
        handle = rankwise.precondition(each, SNGD, tables=True)
        each(given).square().sum().backward()
        handle.step()
        found.append(torch.cat([gradient(layer) for layer in each if [*layer.parameters()]]))
    torch.testing.assert_close(found[0], found[1])


def test_sequences_may_have_time_first():
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:  # (T, N, n)
            return self.out(torch.tanh(self.inner(x)).mean(0))

    torch.manual_seed(0)
    model, x, y = TimeFirst().double(), torch.randn(4, 6, 5).double(), torch.arange(6) % 3
    handle = rankwise.precondition(model, SNGD, axis=1)
    functional.cross_entropy(model(x), y).backward()
    handle.step()
    check(model, [functional.cross_entropy(model(x[:, i : i + 1]), y[i : i + 1]) for i in range(6)])


def test_sequences_of_other_lengths_in_one_step():
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.inner(x))).mean(1)

    torch.manual_seed(0)
    model = Pooled().double()
    handle = rankwise.precondition(model, SNGD)
    losses: list[Tensor] = []
    for step in range(3):
        model.zero_grad()
        losses.clear()
        for length in (2 + step, 5, 3):
            x, y = torch.randn(4, length, 5).double(), torch.arange(4) % 3
            (functional.cross_entropy(model(x), y) / 3).backward()
            losses += losses_of(model, x, y)
        if step == 0:
            seen = handle.capture.take()["inner"].each  # filled up with zeros, also for the bias
            assert seen.inputs[..., -1].sum() == 4 * (2 + 5 + 3)
            continue
        handle.step()
        check(model, losses)
        handle.discard()


def test_losses_without_samples_of_their_own_gradients():
    """A look at other data in evaluation mode, without gradients or with, brings no samples."""

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        loss = functional.cross_entropy(model(x), y)
        model.eval()
        with torch.no_grad():
            model(x[:3])
        model(x[:2])
        model.train()
        return loss

    model = stepped(run)
    check(model, losses_of(model, *batch()))


def test_two_runs_before_one_backward_pass():
    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        parts = [
            functional.cross_entropy(model(x[at]), y[at]) * n for at, n in ((slice(0, 4), 4), (slice(4, 7), 3))
        ]
        return (parts[0] + parts[1]) / 7

    model = stepped(run)
    check(model, losses_of(model, *batch()))


def test_gradients_that_were_dropped_bring_no_samples():
    model, (x, y) = net(), batch()
    handle = rankwise.precondition(model, SNGD)
    functional.cross_entropy(model(x * 2), y).backward()
    model.zero_grad()
    handle.discard()
    functional.cross_entropy(model(x), y).backward()
    handle.step()
    check(model, losses_of(model, x, y))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations(reentrant: bool):
    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        assert isinstance(model, nn.Sequential)
        hidden = checkpoint(model[:2], x.requires_grad_(), use_reentrant=reentrant)
        return functional.cross_entropy(checkpoint(model[2:], hidden, use_reentrant=reentrant), y)

    model = stepped(run)
    check(model, losses_of(model, *batch()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of the compiler
def test_compiled_models():
    """Compiled later it works, also where some steps are not looked at; compiled code knows no later hooks."""
    torch.compiler.reset()
    found = []
    for compiled in (False, True):
        model, (x, y) = net(), batch()
        handle = rankwise.precondition(model, Sngd(damping=0.3, every=2))
        called = torch.compile(model, backend="eager") if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            functional.cross_entropy(called(x), y).backward()
            handle.step()
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1])

    torch.compiler.reset()
    model, (x, y) = net(), batch()
    called = torch.compile(model, backend="eager")
    called(x).sum().backward()
    handle = rankwise.precondition(model, SNGD)
    model.zero_grad()
    functional.cross_entropy(called(x), y).backward()
    with pytest.raises(ValueError, match=r"torch\.compiler\.reset"):
        handle.step()
    torch.compiler.reset()


def test_a_wrapper_that_only_calls_its_model():
    model, (x, y) = net(), batch()
    wrapped = nn.DataParallel(model, device_ids=[])
    handle = rankwise.precondition(wrapped, SNGD)
    assert [*handle.layers] == ["0", "2"]
    functional.cross_entropy(wrapped(x), y).backward()
    handle.step()
    check(model, losses_of(model, x, y))


def test_attention_keeps_its_gradients():
    """Its projections are used without being called; the linear layers around it are called as modules."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    handle = rankwise.precondition(model, SNGD)
    assert [*handle.layers] == ["linear1", "linear2"]
    model(torch.randn(3, 4, 8)).square().mean().backward()
    before = model.self_attn.out_proj.weight.grad.clone()
    handle.step()
    assert torch.equal(model.self_attn.out_proj.weight.grad, before)


def test_a_scaler_passes_over_infinite_gradients_and_goes_on():
    model, (x, y) = net().float(), batch()
    optimizer, scaler = (
        torch.optim.SGD(model.parameters(), lr=0.1),
        torch.amp.GradScaler("cpu", init_scale=2.0**120),
    )
    handle = rankwise.precondition(model, SNGD)
    start, halved, losses = copy.deepcopy(model), 0, []
    for _ in range(6):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x.float()), y) * (1 if losses else 2.0**9)
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if losses:
            assert handle.step(scale=scale)
        else:
            with pytest.warns(RuntimeWarning, match="not finite"):
                assert not handle.step(scale=scale)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        if scaler.get_scale() < scale:
            halved += 1
            assert torch.equal(model[0].weight, start[0].weight)
    assert (halved, handle.skipped, handle.steps) == (1, 1, 5)
    assert losses[-1] < losses[1]


def test_a_scale_changes_nothing_and_has_to_be_one():
    found = []
    for scale in (1.0, 2.0**20):
        model, (x, y) = net(), batch()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        handle = rankwise.precondition(model, SNGD)
        scaler.scale(functional.cross_entropy(model(x), y)).backward()
        scaler.unscale_(optimizer)
        handle.step(scale=scaler.get_scale())
        found.append(gradient(model))
        with pytest.raises(ValueError, match="scale must be"):
            handle.step(scale=0.0)
    torch.testing.assert_close(found[0], found[1])


def test_autocast():
    """Also where the step is taken inside it: inputs and gradients are bfloat16, what is made of them is not."""
    model, (x, y) = net().float(), batch(64)
    handle = rankwise.precondition(model, SNGD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        functional.cross_entropy(model(x.float()), y).backward()
        handle.step()
    assert all(t.dtype == torch.float32 for t in handle.curvature["0"].values() if t.dim())
    found, wanted = gradient(model), net()
    whole = rankwise.precondition(wanted, SNGD)
    functional.cross_entropy(wanted(x), y).backward()
    whole.step()
    torch.testing.assert_close(found.double(), gradient(wanted), rtol=0.1, atol=3e-3)


def test_gradients_set_to_zero():
    model, (x, y) = net(), batch()
    handle = rankwise.precondition(model, SNGD)
    for _ in range(2):
        model.zero_grad(set_to_none=False)
        functional.cross_entropy(model(x), y).backward()
        handle.step()
        check(model, losses_of(model, x, y))
        handle.discard()
    model.zero_grad(set_to_none=False)
    assert handle.step()
    assert not gradient(model).any()


@pytest.mark.parametrize("seed", [-1, 0, 2**63, 2**200])
def test_seeds_may_be_any_whole_numbers(seed: int):
    model, (x, y) = net(), batch()
    handle = rankwise.precondition(model, SNGD, seed=seed)
    functional.cross_entropy(model(x), y).backward()
    assert handle.step()


@pytest.mark.parametrize("at", [0, 1])
def test_an_interrupt_leaves_plain_gradients_or_none(at: int, monkeypatch: pytest.MonkeyPatch):
    model, (x, y) = net(), batch()
    handle = rankwise.precondition(model, SNGD)
    functional.cross_entropy(model(x), y).backward()
    before, put, calls = gradient(model), Conditioned.put, []

    def interrupted(self: Conditioned, *arguments: Tensor) -> None:
        calls.append(1)
        if len(calls) > at:
            raise KeyboardInterrupt
        put(self, *arguments)

    monkeypatch.setattr(Conditioned, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        handle.step()
    assert all(p.grad is None for p in model.parameters())
    monkeypatch.setattr(Conditioned, "put", put)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("refresh", "multiply"):
        model.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        with monkeypatch.context() as patch:
            patch.setattr(Curvatures, name, stopped)
            with pytest.raises(KeyboardInterrupt):
                handle.step()
        assert torch.equal(gradient(model), before)


def test_a_weight_that_was_replaced():
    model, (x, y) = net(), batch()
    handle = rankwise.precondition(model, SNGD)
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    functional.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match=r"layer 2 has another weight .* call rankwise.precondition after"):
        handle.step()


def test_a_handle_says_what_it_is():
    handle = rankwise.precondition(net(), dataclasses.replace(SNGD, damping=lambda step: 0.1))
    assert "Sngd" in repr(handle)
    assert "2 layers" in repr(handle)


@pytest.mark.parametrize("options", [{"seed": 0.5}, {"seed": True}, {"workers": float("nan")}, {"axis": -1}])
def test_options_that_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        rankwise.precondition(net(), SNGD, **options)


@pytest.mark.parametrize(
    "method",
    [
        Kfac(damping=0.1, sharing=expanded),
        Ekfac(damping=0.1, moments=expanded),
        Sngd(damping=0.1, sharing=expanded),
        HyLo(damping=0.1, mode="exact", sharing=expanded),
    ],
    ids=lambda method: type(method).__name__,
)
def test_sequences_whose_losses_are_means_are_as_their_tokens(method: Preconditioner):
    """(N, T, n) with positions=T is N T flat samples; without it damping acts like T times as much."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 8, 5, generator=rng).double(), torch.randint(0, 3, (4, 8), generator=rng)
    found = []
    for inputs, positions in ((x.flatten(0, 1), 1), (x, 8), (x, 1)):
        torch.manual_seed(0)
        model = nn.Linear(5, 3).double()
        handle = rankwise.precondition(model, method)
        for _ in range(2):  # of Ekfac the first is Kfac's
            model.zero_grad()
            functional.cross_entropy(model(inputs).reshape(-1, 3), y.flatten()).backward()
            handle.step(positions=positions)
        found.append(gradient(model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)
    assert (found[2] - found[0]).norm() > 0.1 * found[0].norm()
    with pytest.raises(ValueError, match="positions must be"):
        handle.step(positions=0)


@pytest.mark.parametrize(
    ("method", "changed", "field"),
    [
        (MFac(gradients=4), {"gradients": 8}, "gradients=4, not of 8"),
        (MFac(gradients=4), {"storage": torch.bfloat16}, "storage=None, not of torch.bfloat16"),
        (Kfac(), {"solver": Separately()}, "solver="),
        (Kfac(), {"largest_side": 2}, "largest_side=8192, not of 2"),
        (Ekfac(), {"largest_side": 2}, "largest_side=8192, not of 2"),
        (SNGD, {"together": True}, "together=False, not of True"),
        (MFac(gradients=4), {"damping": 1.0}, None),
        (Kfac(), {"damping": 1.0, "every": 4, "decay": 0.5}, None),
        (HyLo(rank=2), {"damping": lambda step: 1.0, "every": 2, "window": 1, "rank": 3, "mode": "kis"}, None),
    ],
)
def test_a_state_is_of_one_form(method: Preconditioner, changed: dict, field: str | None):
    model, (x, y) = net(), batch()
    first = rankwise.precondition(model, method)
    functional.cross_entropy(model(x), y).backward()
    first.step()
    state = first.state_dict()
    first.remove()
    second = rankwise.precondition(model, dataclasses.replace(method, **changed))  # pyright: ignore
    if field is None:
        second.load_state_dict(state)
        functional.cross_entropy(model(x), y).backward()
        assert second.step()
    else:
        with pytest.raises(ValueError, match=f"the state is of .* with {field}"):
            second.load_state_dict(state)


def test_finite_gradients_whose_squares_are_not_are_finite():
    """In float32 the norm of numbers of 1e20 is infinite."""
    layer = nn.Linear(4, 3)
    handle = rankwise.precondition(layer, Kfac(damping=0.5))
    layer(torch.randn(5, 4)).sum().backward()
    assert layer.weight.grad is not None
    layer.weight.grad.fill_(1e20)
    assert handle.step()
    assert 1e18 < float(layer.weight.grad.double().norm()) < 1e21


def test_a_layer_that_is_never_used_makes_no_step_a_look():
    torch.manual_seed(0)
    model, (x, y) = Named().double(), batch()
    handle = rankwise.precondition(model, Sngd(damping=0.3, every=3))
    for step in range(6):
        functional.cross_entropy(model(x=x), y).backward()
        handle.step()
        assert handle.traffic()["exchange"]["times"] == 2 * (1 + step // 3)
        assert handle.samples() == 0


def test_single_numbers_are_on_the_cpu():
    """Wherever a state comes from."""
    model, (x, y) = net(), batch()
    for method in (SNGD, Kfac(), HyLo(window=1), MFac(gradients=2)):
        handle = rankwise.precondition(model, method)
        functional.cross_entropy(model(x), y).backward()
        handle.step()
        state = handle.state_dict()
        state["curvature"] = {
            block: {name: t if t.dim() else t.to("meta") for name, t in tensors.items()}
            for block, tensors in state["curvature"].items()
        }
        with pytest.raises(NotImplementedError):  # which asks for the values, to put them on the CPU
            handle.load_state_dict(state)
        handle.remove()


def test_one_handle_at_a_time_changes_the_gradients_of_a_layer():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    first = rankwise.precondition(net, Sngd(damping=0.1), where=lambda name, _: name == "0")
    with pytest.raises(ValueError, match=r"layer 0 is preconditioned already; call remove\(\)"):
        rankwise.precondition(net, Sngd(damping=0.1))
    second = rankwise.precondition(net, Sngd(damping=0.1), where=lambda name, _: name == "1")
    first.remove()
    second.remove()
    rankwise.precondition(net, Sngd(damping=0.1)).remove()


def test_a_step_needs_a_gradient():
    net = nn.Linear(3, 2)
    handle = rankwise.precondition(net, Sngd(damping=0.1))
    with pytest.raises(ValueError, match=r"call loss.backward\(\)"):
        handle.step()
    assert handle.steps == 0
    net(torch.randn(4, 3)).square().mean().backward()
    assert handle.step()


def test_a_name_is_no_method():
    with pytest.raises(TypeError, match=r"object from rankwise.preconditioners, got 'kfac'"):
        rankwise.precondition(nn.Linear(3, 2), "kfac")  # pyright: ignore[reportArgumentType]
