"""Hooks of layers, and wrappers around models, while structured layers come and go."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

import rankwise
from rankwise.adapters import Lora
from rankwise.compressors import PlainSvd


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def unnamed(model: nn.Module) -> None:
    rankwise.adapt(model, Lora(rank=2))
    rankwise.fold(model)


def named(model: nn.Module) -> None:
    rankwise.adapt(model, Lora(rank=2), name="a")
    rankwise.remove_adapter(model, "a")


@pytest.mark.parametrize("change", [unnamed, named])
def test_hooks_stay_and_their_handles_work(change: Any):
    model, x, called = net(), torch.randn(3, 6), []

    def doubled(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        called.append(type(layer).__name__)
        return 2 * output

    handles = [model[0].register_forward_hook(doubled), model[2].register_forward_pre_hook(lambda *_: None)]
    wanted = model(x)
    change(model)
    called.clear()
    torch.testing.assert_close(model(x), wanted)
    assert called == ["Linear"]
    for handle in handles:
        handle.remove()
    assert not torch.allclose(model(x), wanted)
    assert called == ["Linear"]


def test_a_structured_layer_has_the_hooks_of_the_one_before():
    model, x = net(), torch.randn(3, 6)
    model[0].register_forward_hook(lambda layer, args, output: 2 * output)
    wanted = model(x)
    rankwise.adapt(model, Lora(rank=2))
    torch.testing.assert_close(model(x), wanted)


def test_models_that_accelerate_moves_about_are_refused():
    model = cpu_offload(net())
    with pytest.raises(ValueError, match="Accelerate moves the weights"):
        rankwise.adapt(model, Lora(rank=2))


def test_a_layer_whose_weight_is_made_anew_at_each_call_is_no_matrix():
    model = net()
    torch.nn.utils.parametrizations.weight_norm(model[0])
    rankwise.adapt(model, Lora(rank=2))
    assert [name for name, p in model.named_parameters() if p.requires_grad] != []
    assert all("2." in name for name, p in model.named_parameters() if p.requires_grad)
    assert model(torch.randn(3, 6)).shape == (3, 4)


class Compiled(nn.Module):
    """What torch.compile returns, as far as names go."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._orig_mod = inner

    def forward(self, x: Tensor) -> Tensor:
        return self._orig_mod(x)


@pytest.mark.parametrize(
    "wrap", [Compiled, lambda m: nn.DataParallel(m, device_ids=[])], ids=["compiled", "parallel"]
)
@pytest.mark.parametrize("format", ["rankwise", "peft"])
def test_files_know_nothing_of_wrappers(wrap: Any, format: Any, tmp_path: Path):
    model, x = net(), torch.randn(3, 6)
    rankwise.adapt(model, Lora(rank=2))
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    rankwise.save(wrap(model), tmp_path / "adapter", format=format)
    other = net()
    assert not torch.allclose(other(x), model(x))
    rankwise.load_adapter(wrap(other), tmp_path / "adapter")
    torch.testing.assert_close(other(x), model(x))


def test_what_was_adapted_and_folded_is_frozen_like_the_rest():
    model = net()
    rankwise.adapt(model, Lora(rank=2), where=lambda name, _: name == "0")
    rankwise.fold(model)
    assert not any(p.requires_grad for p in model.parameters())
    other = net()
    rankwise.compress(other, PlainSvd(), keep=0.6)
    assert all(p.requires_grad for p in rankwise.fold(other).parameters())
