"""The experts of a mixture, kept in 3-D parameters, are adapted like any other layer."""

from typing import Any

import pytest
import torch
from contracts.examples import draw
from mixtures import MIXTURES
from torch import Generator, Tensor, nn

import rankwise
from rankwise import CalibrationError
from rankwise.adapters import Eva, Householder, Lora, Snella, Tera
from rankwise.core.methods import Adapter
from rankwise.core.surgery import StructuredLinear


def ids() -> Tensor:
    return torch.randint(3, 64, (6, 20), generator=Generator().manual_seed(1))


def output(model: Any) -> Tensor:
    with torch.no_grad():
        return model(ids()).logits


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def large_enough(name: str, layer: nn.Module) -> bool:
    """All but a gate of one output, which has no rank of two, and the head."""
    return name != "lm_head" and not name.endswith("shared_expert_gate")


def adapted(model: Any, method: Adapter, **options: Any) -> list[nn.Parameter]:
    rankwise.adapt(model, method, **{"where": large_enough, "data": [ids()], **options})
    return [p for p in model.parameters() if p.requires_grad]


def trained(model: Any, parameters: list[nn.Parameter], steps: int = 3) -> list[float]:
    optimizer, losses = torch.optim.AdamW(parameters, lr=0.02), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize(
    "method", [Lora(rank=2), Householder(rank=2), Tera(), Snella(rank=2)], ids=lambda m: type(m).__name__
)
def test_it_starts_exact_trains_alone_and_folds_to_the_same_modules(family: str, method: Adapter):
    model = MIXTURES[family]()
    before, modules, names = output(model), kinds(model), list(model.state_dict())
    way = model.get_experts_implementation()
    own = adapted(model, method)
    torch.testing.assert_close(output(model), before, rtol=0, atol=5e-6)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    losses = trained(model, own)
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in own)
    state = dict(model.named_parameters())
    assert all(torch.equal(state[name], p) for name, p in frozen.items())
    after = output(model)
    rankwise.fold(model)
    assert kinds(model) == modules
    assert sorted(model.state_dict()) == sorted(names)
    assert model.get_experts_implementation() == way
    torch.testing.assert_close(output(model), after, rtol=0, atol=5e-6)
    assert not torch.allclose(after, before, atol=1e-4)


def test_one_expert_alone_is_adapted():
    model = MIXTURES["mixtral"]()
    name = "model.layers.1.mlp.experts.gate_up_proj.2"
    before = {key: t.clone() for key, t in model.state_dict().items()}
    own = adapted(model, Lora(rank=2), where=lambda path, _: path == name)
    assert sum(p.numel() for p in own) == 2 * sum(model.get_submodule(name).matrix.shape)
    trained(model, own)
    rankwise.fold(model)
    changed = {key for key, t in model.state_dict().items() if not torch.equal(t, before[key])}
    key = name.rpartition(".")[0]
    assert changed == {key}
    assert [bool((a != b).any()) for a, b in zip(model.state_dict()[key], before[key], strict=True)] == [
        False,
        False,
        True,
    ]


def test_the_gradient_of_a_factor_is_that_of_the_whole_parameter_in_it():
    """dL/dB = dL/dW A' of the same slice, found without the adapter."""
    model, plain = MIXTURES["qwen3 moe"](), MIXTURES["qwen3 moe"]()
    adapted(model, Lora(rank=2))
    model(ids(), labels=ids()).loss.backward()
    plain(ids(), labels=ids()).loss.backward()
    path = "model.layers.0.mlp.experts"
    for i in range(4):
        layer = model.get_submodule(f"{path}.down_proj.{i}")
        assert isinstance(layer, StructuredLinear)
        low = layer.matrix.get_submodule("members.1").matrix
        slope = plain.get_submodule(path).down_proj.grad[i]
        torch.testing.assert_close(low.left.grad, slope @ low.right.mT, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_a_saved_model_keeps_the_adapters_of_its_experts(family: str, tmp_path):
    model = MIXTURES[family]()
    for p in adapted(model, Lora(rank=2)):
        p.data += 0.1 * draw(*p.shape, dtype=torch.float32)
    rankwise.save(model, tmp_path / "out", format="rankwise")
    other = MIXTURES[family]()
    rankwise.load_adapter(other, tmp_path / "out")
    assert torch.equal(output(other), output(model))


def test_methods_that_read_data_name_an_expert_that_none_of_it_reached():
    model = MIXTURES["gpt-oss"]()
    for layer in model.model.layers:
        layer.mlp.router.bias.data[2] = -1e4
    modules = kinds(model)
    with pytest.raises(CalibrationError, match=r"experts\.gate_up_proj\.2.* was never reached"):
        adapted(model, Eva(rank=2))
    assert kinds(model) == modules
