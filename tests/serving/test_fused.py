"""What a server does with the layers of a compressed model, by pure functions and with a stand-in for vLLM."""

import sys
import types
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from structures import filled, low_bit_and_low_rank, low_rank, pivoted, quantized, sparse
from tiny import llama
from torch import Tensor, nn

import rankwise
from rankwise.matrices import Dense
from rankwise.models.quantizer import describe
from rankwise.serving import fused, vllm_plugin

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
LAYER = "model.layers.1."


def model() -> nn.Module:
    """Different structures side by side, and one dense matrix among them."""
    small = filled(llama(), low_rank, pivoted, quantized, sparse, low_bit_and_low_rank)
    dense = small.get_submodule(f"{LAYER}self_attn.k_proj").dense()
    small.get_submodule(f"{LAYER}self_attn").k_proj = dense
    return small


def tensors(small: nn.Module, names: list[str]) -> dict[str, dict[int, Tensor]]:
    state, found = small.state_dict(), {}
    for i, name in enumerate(names):
        for key, tensor in state.items():
            if key.startswith(f"{name}."):
                found.setdefault(key.removeprefix(f"{name}."), {})[i] = tensor
    return found


def test_a_fused_layer_knows_its_members_and_shapes():
    small = model()
    specs = fused.specs_by_name(describe(small))
    members = fused.member_specs(f"{LAYER}self_attn.qkv_proj", PACKED, specs)
    assert [None if spec is None else spec["kind"] for spec in members] == ["Quantized", None, "Sum"]
    assert fused.member_specs(f"{LAYER}mlp.down_proj", PACKED, specs) == [specs[f"{LAYER}mlp.down_proj"]]
    assert fused.member_specs("lm_head", PACKED, specs) == [None]
    shapes = fused.tensor_shapes(members)
    found = tensors(small, [f"{LAYER}self_attn.{name}" for name in PACKED["qkv_proj"]])
    del found["weight"][1]
    assert shapes == {key: {i: tuple(t.shape) for i, t in each.items()} for key, each in found.items()}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_devices_together_compute_the_layer(world):
    small = model()
    specs = fused.specs_by_name(describe(small))
    x = torch.randn(3, 32)
    names = [f"{LAYER}self_attn.{name}" for name in PACKED["qkv_proj"]]
    members = fused.member_specs(f"{LAYER}self_attn.qkv_proj", PACKED, specs)
    whole = fused.assemble(members, tensors(small, names))
    outputs = [32 // world, max(16 // world, 8), max(16 // world, 8)]  # heads of 8 rows, two of keys and values
    each = [
        fused.apply(fused.split(whole, outputs, 32, rank, world), x).split(outputs, -1) for rank in range(world)
    ]
    copies = world * outputs[1] // 16
    for i, name in enumerate(names):
        parts = [part[i] for part in (each if i == 0 else each[::copies])]
        torch.testing.assert_close(torch.cat(parts, -1), small.get_submodule(name)(x))
    name = f"{LAYER}mlp.down_proj"
    whole, x = fused.assemble([specs[name]], tensors(small, [name])), torch.randn(3, 48)
    shares = x.split(48 // world, -1)
    sums = sum(fused.apply(fused.split(whole, [32], 48 // world, r, world), shares[r]) for r in range(world))
    torch.testing.assert_close(sums, small.get_submodule(name)(x))


def test_damaged_layers_are_refused():
    small = model()
    specs = fused.specs_by_name(describe(small))
    name = f"{LAYER}mlp.down_proj"
    found = tensors(small, [name])
    with pytest.raises(ValueError, match="not in the checkpoint"):
        fused.assemble([specs[name]], {key: t for key, t in found.items() if key == "weight"})
    key = next(key for key in found if key.startswith("matrix."))
    with pytest.raises(ValueError, match=f"{key} of matrix 0"):
        fused.assemble([specs[name]], {**found, key: {0: torch.zeros(3, 3, 3)}})
    with pytest.raises(ValueError, match=f"{key} of matrix 0"):
        fused.assemble([specs[name]], {**found, key: {0: torch.zeros_like(found[key][0], dtype=torch.int8)}})
    with pytest.raises(ValueError, match="share a matrix"):
        fused.specs_by_name([{"names": ["a", "b"], "spec": {}}])
    with pytest.raises(ValueError, match="b, a share a matrix or part"):
        fused.specs_by_name([{"names": ["b"], "spec": {}, "shared": {"members.1": ["a", "members.1"]}}])
    with pytest.raises(ValueError, match="a got a bias from compression"):
        fused.specs_by_name([{"names": ["a"], "biased": ["a"], "spec": {}}])
    with pytest.raises(ValueError, match="holds 1 matrix for 3 outputs"):
        fused.split([Dense(torch.zeros(16, 8))], [8, 4, 4], 8, 0, 1)


def test_numbers_that_a_matrix_cannot_use_are_refused():
    matrix = pivoted(8, 6)
    found = {f"matrix.{key}": {0: tensor.clone()} for key, tensor in matrix.state_dict().items()}
    found["matrix.order"][0].zero_()
    with pytest.raises(ValueError, match=r"matrix 0: .*order"):
        fused.assemble([matrix.spec()], found)


class LinearBase(nn.Module):
    """As much of vLLM's fused layer as the plugin sees."""

    def __init__(self, config: Any, prefix: str, sizes: list[int], inputs: int, rank: int, world: int) -> None:
        super().__init__()
        self.params_dtype, self.tp_rank, self.tp_size = torch.float32, rank, world
        self.quant_method = config.get_quant_method(self, prefix)
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=inputs,
            output_partition_sizes=sizes,
            input_size=inputs,
            output_size=sum(sizes) * world,
            params_dtype=torch.float32,
            weight_loader=None,
        )


class Unquantized:
    pass


@pytest.fixture
def quantization(monkeypatch):
    """Stand-ins for the modules of vLLM that the plugin imports."""

    class Config:
        def __init__(self) -> None:
            self.packed_modules_mapping = PACKED

    def register(name):
        quantization.QUANTIZATION_METHODS.append(name)
        return lambda kind: quantization.__dict__.setdefault("registered", {}).update({name: kind})

    quantization: Any = types.ModuleType("vllm.model_executor.layers.quantization")
    quantization.QUANTIZATION_METHODS = []
    quantization.QuantizationConfig = Config
    quantization.register_quantization_config = register
    linear: Any = types.ModuleType("vllm.model_executor.layers.linear")
    linear.LinearBase, linear.LinearMethodBase, linear.UnquantizedLinearMethod = LinearBase, object, Unquantized
    layers: Any = types.ModuleType("vllm.model_executor.layers")
    layers.quantization, layers.linear = quantization, linear
    for module in (
        types.ModuleType("vllm"),
        types.ModuleType("vllm.model_executor"),
        layers,
        quantization,
        linear,
    ):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return quantization


@pytest.mark.parametrize("world", [1, 2])
def test_the_plugin_loads_a_file_as_vllm_would(quantization, world, tmp_path):
    small = model()
    rankwise.save(small, tmp_path / "small")
    vllm_plugin.register()
    vllm_plugin.register()
    assert quantization.QUANTIZATION_METHODS == ["rankwise"]
    written = {"version": 1, "matrices": describe(small)}
    config = quantization.registered["rankwise"].from_config(written)
    with pytest.raises(ValueError, match="version 9"):
        quantization.registered["rankwise"].from_config({**written, "version": 9})
    assert config.get_quant_method(nn.Embedding(2, 2), "model.embed_tokens") is None
    with pytest.raises(ValueError, match="compressed experts"):
        config.get_quant_method(nn.Module(), f"{LAYER}self_attn")
    x, prefix = torch.randn(3, 32), f"{LAYER}self_attn.qkv_proj"
    found = []
    for rank in range(world):
        sizes = [32 // world, 16 // world, 16 // world]
        layer = LinearBase(config, prefix, sizes, 32, rank, world)
        parameters = {f"{prefix}.{name}": p for name, p in layer.named_parameters()}
        for name, tensor in load_file(tmp_path / "small" / "model.safetensors").items():
            for member in PACKED["qkv_proj"]:
                if name.startswith(f"{LAYER}self_attn.{member}."):
                    own: Any = parameters[name.replace(member, "qkv_proj")]
                    own.weight_loader(own, tensor, member[0])
        method: Any = layer.quant_method
        method.process_weights_after_loading(layer)
        assert all(name.startswith("rankwise_parts") for name, _ in layer.named_parameters())
        found.append(method.apply(layer, x, torch.ones(64 // world)).split(sizes, -1))
    for i, member in enumerate(PACKED["qkv_proj"]):
        wanted = small.get_submodule(f"{LAYER}self_attn.{member}")(x) + 1
        torch.testing.assert_close(torch.cat([each[i] for each in found], -1), wanted)


def test_layers_that_are_dense_are_left_to_vllm(quantization):
    vllm_plugin.register()
    config = quantization.registered["rankwise"].from_config({"version": 1, "matrices": []})
    layer = LinearBase.__new__(LinearBase)
    assert isinstance(config.get_quant_method(layer, "lm_head"), Unquantized)
