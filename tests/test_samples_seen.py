"""What a handle of precondition has seen, and of which gradients it knows: each backward pass, once."""

import copy
import gc

import pytest
import torch
from torch import Tensor, nn

from rankwise import precondition
from rankwise.core.preconditioner import Preconditioner
from rankwise.linalg import expanded
from rankwise.preconditioners import Kfac, Sngd


def two_heads() -> tuple[nn.Module, Tensor]:
    """A small network and its inputs, the same at each call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double(), torch.randn(6, 5).double()


@pytest.mark.parametrize("method", [Kfac(damping=0.1), Sngd(damping=0.1, sharing=expanded)], ids=["kfac", "sngd"])
def test_two_backward_passes_through_one_run_are_one_of_their_sum(method: Preconditioner):
    found = []
    for apart in (True, False):
        model, x = two_heads()
        handle = precondition(model, method)
        for _ in range(2):  # what a step before has seen is not added to
            y = model(x)
            one, two = y[:, 0].square().mean(), (y[:, 1:] - 1).square().sum(1).mean()
            model.zero_grad()
            if apart:
                one.backward(retain_graph=True)
                two.backward()
            else:
                (one + two).backward()
            assert handle.samples() == 6
            handle.step()
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_graph_that_is_used_again_in_the_next_step_is_seen_anew():
    natural = []
    for again in (True, False):
        model, x = two_heads()
        handle = precondition(model, Kfac(damping=0.1))
        loss = model(x).square().mean()
        for _ in range(2):
            model.zero_grad()
            if not again:
                loss = model(x).square().mean()
            loss.backward(retain_graph=again)
            handle.step()
        natural.append([p.grad for p in model.parameters()])
    for a, b in zip(*natural, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_inputs_that_change_after_the_call_are_refused():
    """Without autocast autograd refuses it itself; with it, the layer has kept a copy in another type."""

    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).float()
            x += self.second(x)
            return x

    model = Grows()
    handle = precondition(model, Sngd(damping=0.1))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(4, 5)).square().mean()
    with pytest.raises(RuntimeError, match="layer second were changed in place"):
        loss.backward()
    handle.remove()


def test_samples_dropped_between_a_run_and_its_backward_pass_are_those_of_before():
    natural = []
    for dropped in (True, False):
        model, x = two_heads()
        handle = precondition(model, Sngd(damping=0.1))
        if dropped:
            model(x + 1).square().mean().backward()
        loss = model(x).square().mean()
        if dropped:
            model.zero_grad()
            handle.discard()
        loss = loss + model(2 * x).square().mean()
        (loss / 2).backward()
        assert handle.samples() == 12
        handle.step()
        natural.append([p.grad for p in model.parameters()])
    for a, b in zip(*natural, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_handle_that_is_dropped_takes_its_hooks_off():
    model, x = two_heads()

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    handle = precondition(model, Kfac())
    capture = handle.capture
    model(x).square().mean().backward()
    assert hooks() == 3
    assert capture.calls
    del handle
    gc.collect()
    assert hooks() == 0
    assert not capture.calls
    assert not capture.used


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_gradients_beside_the_layers_count_as_well(value: float):
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    handle = precondition(model, Kfac())
    model(torch.randn(6, 5)).square().mean().backward()
    model[1].weight.grad[0] = value
    with pytest.warns(RuntimeWarning, match="not finite"):
        assert not handle.step()
    assert handle.skipped == 1
    assert all(p.grad is None for p in model.parameters())


def test_kl_clip_knows_the_rate_of_each_layer():
    for rates in ((1e-6, 10.0), (10.0, 1e-6), (0.0, 10.0)):
        model, x = two_heads()
        groups = [{"params": model[i].parameters(), "lr": lr} for i, lr in zip((0, 2), rates, strict=True)]
        optimizer = torch.optim.SGD(groups)
        handle = precondition(model, Sngd(damping=0.1), kl_clip=1e-3, optimizer=optimizer)
        model(x).square().mean().backward()
        before = [p.grad.clone() for p in model.parameters()]
        handle.step()
        # natural gradients v = c F^-1 g are shortened by c, so that lr^2 v'F v = c lr^2 v'g
        free = unshortened(model, x)
        factor = float(next(iter(model.parameters())).grad.norm() / free[0].norm())
        lrs = [rates[0], rates[0], rates[1], rates[1]]
        terms = [lr**2 * float((v * g).sum()) for lr, v, g in zip(lrs, free, before, strict=True)]
        assert factor**2 * sum(terms) == pytest.approx(1e-3, rel=1e-6)
        handle.remove()


def unshortened(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The same natural gradients, not shortened; of a copy."""
    again = copy.deepcopy(model)
    again.zero_grad()
    handle = precondition(again, Sngd(damping=0.1))
    again(x).square().mean().backward()
    handle.step()
    return [p.grad for p in again.parameters()]


def test_a_bias_that_is_frozen_later_is_refused():
    model, x = two_heads()
    handle = precondition(model, Kfac())
    model[0].bias.requires_grad_(False)
    model(x).square().mean().backward()
    with pytest.raises(ValueError, match="bias of layer 0 was frozen"):
        handle.step()
