"""PEFT's folders against key names, fields and formulas written down by hand; the real PEFT is in benchmarks."""

import json
import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.examples import draw
from safetensors.torch import load_file, save_file
from tiny import gpt2, ids, llama
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import rankwise
from rankwise.adapters import Lora
from rankwise.core.adapted import adapted
from rankwise.initialisers import SingularVectors
from rankwise.matrices import Base, Branch, Dense, Diagonal, Frozen, LowRank, Product, StructuredMatrix, Sum

CONFIG, TENSORS, BASES = "adapter_config.json", "adapter_model.safetensors", "rankwise_bases.json"


def net() -> nn.Sequential:
    """Two layers, one of which no short name tells from the other."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Sequential(nn.Linear(12, 8))).double()


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.3 * draw(*parameter.shape, seed=i).to(parameter))
    return model


def written(model: nn.Module, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    rankwise.save(model, folder, format="peft")
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, TENSORS, BASES]
    return json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)


def folder_of(path: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """A folder as PEFT writes it."""
    path.mkdir(exist_ok=True)
    usual = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "bias": "none", "target_modules": ["0"]}
    usual |= {"peft_version": "0.21.2", "inference_mode": True, "lora_bias": False, "use_qalora": False}
    (path / CONFIG).write_text(json.dumps(usual | config))
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, path / TENSORS)
    return path


def edited(folder: Path, change: Callable[[dict[str, Any]], object], file: str = CONFIG) -> Path:
    """The folder with another description."""
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))
    return folder


def factors(layer: str = "0", m: int = 12, n: int = 8, r: int = 2) -> dict[str, Tensor]:
    return {f"{layer}.lora_A.weight": draw(r, n, seed=1), f"{layer}.lora_B.weight": draw(m, r, seed=2)}


def one_layer() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12)).double()


def change(model: nn.Sequential, folder: Path) -> Tensor:
    """What a folder changes in the weight of the only layer."""
    before = model[0].weight.detach().clone()
    rankwise.load_adapter(model, folder)
    return model[0].matrix.dense().detach() - before


def test_the_names_and_fields_of_a_lora(tmp_path: Path):
    model = llama()
    where = lambda name, layer: name.endswith(("0.self_attn.q_proj", "1.mlp.up_proj"))  # noqa: E731
    rankwise.adapt(model, Lora(rank=2, alpha=6.0, dropout=0.1), where=where)
    config, tensors = written(model, tmp_path / "a")
    q, up = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.layers.1.mlp.up_proj"
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        f"{q}.lora_A.weight": (2, 32),
        f"{q}.lora_B.weight": (32, 2),
        f"{up}.lora_A.weight": (2, 32),
        f"{up}.lora_B.weight": (48, 2),
    }
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": 2,
        "lora_alpha": 6,
        "lora_dropout": 0.1,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "fan_in_fan_out": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"],
        "modules_to_save": None,
        "bias": "none",
        "ensure_weight_tying": False,
    }


def test_short_names_where_they_say_the_same(tmp_path: Path):
    model = llama()
    rankwise.adapt(model, Lora(rank=2), where=lambda name, layer: name.endswith(("q_proj", "v_proj")))
    assert written(model, tmp_path / "a")[0]["target_modules"] == ["q_proj", "v_proj"]


def test_an_expression_where_names_say_too_much(tmp_path: Path):
    model = net()
    rankwise.adapt(model, Lora(rank=2), where=lambda name, layer: name == "0")
    assert written(model, tmp_path / "a")[0]["target_modules"] == "0"  # as a list it would be 2.0 too


def test_ranks_and_scales_of_single_layers(tmp_path: Path):
    model = net()
    rankwise.adapt(model, Lora(rank=2, alpha=6.0), where=lambda name, layer: name == "0")
    left, right = draw(8, 3), draw(3, 12)
    site = rankwise.core.surgery.select(model, lambda name, layer: name == "2.0")["2.0"]
    rankwise.core.surgery.replace(model, site, Sum(Base(Dense(site.weight)), Branch(LowRank(left, right), 5.0)))
    config, _ = written(model, tmp_path / "a")
    assert (config["r"], config["lora_alpha"]) == (2, 6)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({r"^2\.0": 3}, {r"^2\.0": 15})
    again = net()
    rankwise.load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(again(draw(3, 8)), model(draw(3, 8)))


@pytest.mark.parametrize(("rank_stabilised", "scale"), [(False, 8 / 2), (True, 8 / math.sqrt(2))])
def test_the_formula_of_lora(rank_stabilised: bool, scale: float, tmp_path: Path):
    folder = folder_of(tmp_path / "a", factors(), use_rslora=rank_stabilised)
    torch.testing.assert_close(change(one_layer(), folder), scale * draw(12, 2, seed=2) @ draw(2, 8, seed=1))


def test_fields_that_are_left_out_are_those_of_peft(tmp_path: Path):
    folder = edited(folder_of(tmp_path / "a", factors()), lambda config: config.pop("lora_alpha"))
    torch.testing.assert_close(change(one_layer(), folder), 8 / 2 * draw(12, 2, seed=2) @ draw(2, 8, seed=1))
    edited(folder, lambda config: config.pop("r"))
    with pytest.raises(ValueError, match="rank is 2, but 8 in the description"):
        rankwise.load_adapter(one_layer(), folder)
    eight = edited(folder_of(tmp_path / "b", factors(r=8)), lambda config: config.pop("r"))
    torch.testing.assert_close(change(one_layer(), eight), draw(12, 8, seed=2) @ draw(8, 8, seed=1))


def test_the_formula_of_dora(tmp_path: Path):
    lengths = draw(12, seed=3).abs()
    folder = folder_of(tmp_path / "a", factors() | {"0.lora_magnitude_vector": lengths}, use_dora=True)
    model = one_layer()
    weight = model[0].weight.detach() + 4 * draw(12, 2, seed=2) @ draw(2, 8, seed=1)
    expected = lengths[:, None] * weight / weight.norm(dim=1, keepdim=True)
    rankwise.load_adapter(model, folder)
    torch.testing.assert_close(model[0].matrix.dense().detach(), expected)


def test_the_formula_of_adalora(tmp_path: Path):
    left, values, right = draw(12, 2, seed=2), draw(2, 1, seed=3), draw(2, 8, seed=1)
    tensors = {"0.lora_A": right, "0.lora_B": left, "0.lora_E": values}
    pattern = {"0.lora_E": [True, False, True]}
    more = {"init_r": 3, "target_r": 2, "r": 8, "total_step": 9, "rank_pattern": pattern}
    folder = folder_of(tmp_path / "a", tensors, peft_type="ADALORA", **more)
    expected = 8 / (3 + 1e-5) * left @ (right * values)
    torch.testing.assert_close(change(one_layer(), folder), expected)


def test_an_adalora_of_rank_0_changes_nothing(tmp_path: Path):
    tensors = {"0.lora_A": draw(0, 8), "0.lora_B": draw(12, 0), "0.lora_E": draw(0, 1)}
    tensors |= {"2.0.lora_A": draw(1, 12), "2.0.lora_B": draw(8, 1), "2.0.lora_E": draw(1, 1)}
    folder = folder_of(tmp_path / "a", tensors, peft_type="ADALORA", init_r=3, target_r=1, total_step=9)
    report = rankwise.load_adapter(net(), folder)
    assert [row["name"] for row in report.rows] == ["2.0"]


@pytest.mark.parametrize("commuting", [False, True])
def test_the_formula_of_hra(commuting: bool, tmp_path: Path):
    vectors = draw(8, 3, seed=1)
    tensors = {"0.hra_u": vectors}
    folder = folder_of(tmp_path / "a", tensors, peft_type="HRA", r=3, apply_GS=commuting, lora_alpha=0)
    turned = torch.eye(8).double()
    for column in (torch.linalg.qr(vectors).Q if commuting else vectors).mT:
        turned = turned @ (torch.eye(8).double() - 2 * torch.outer(column, column) / column.dot(column))
    model = one_layer()
    before = model[0].weight.detach().clone()
    torch.testing.assert_close(change(model, folder), before @ turned - before)
    edited(folder, lambda config: config.update(r=2))
    with pytest.raises(ValueError, match=r"its vectors are \(8, 3\), but 2 in the description"):
        rankwise.load_adapter(one_layer(), folder)


def kronecker(whole: str) -> dict[str, Tensor]:
    """Factors of (3, 2) and (4, 4), of which those named are whole."""
    found = {}
    for i, (name, (m, n)) in enumerate({"w1": (3, 2), "w2": (4, 4)}.items()):
        if name in whole:
            found[f"0.lokr_{name}"] = draw(m, n, seed=i)
        else:
            found |= {f"0.lokr_{name}_a": draw(m, 2, seed=i), f"0.lokr_{name}_b": draw(2, n, seed=i + 9)}
    return found


@pytest.mark.parametrize("whole", ["w1 w2", "w1", "w2", "none"])
def test_the_formula_of_lokr(whole: str, tmp_path: Path):
    tensors = kronecker(whole)
    folder = folder_of(tmp_path / "a", tensors, peft_type="LOKR", r=2, alpha=5, lora_alpha=0)
    part = {name.removeprefix("0.lokr_"): tensor for name, tensor in tensors.items()}
    one, two = (part[w] if w in part else part[f"{w}_a"] @ part[f"{w}_b"] for w in ("w1", "w2"))
    torch.testing.assert_close(change(one_layer(), folder), 5 / 2 * torch.kron(one, two))
    edited(folder, lambda config: config.update(alpha_pattern={"0": 3}, rank_pattern={"0": 1}))
    torch.testing.assert_close(change(one_layer(), folder), 3 * torch.kron(one, two))
    edited(folder, lambda config: config.update(use_effective_conv2d=True))
    with pytest.raises(ValueError, match="use_effective_conv2d = True, which is not supported"):
        rankwise.load_adapter(one_layer(), folder)


def test_half_a_lokr_is_refused(tmp_path: Path):
    tensors = {name: tensor for name, tensor in kronecker("w1").items() if name != "0.lokr_w2_b"}
    folder = folder_of(tmp_path / "a", tensors, peft_type="LOKR", lora_alpha=0)
    with pytest.raises(ValueError, match="it has neither lokr_w2 nor its two factors"):
        rankwise.load_adapter(one_layer(), folder)


def hadamard(rank: int) -> dict[str, Tensor]:
    """Two pairs of factors of a (12, 8) matrix."""
    shapes = {"w1_a": (12, rank), "w1_b": (rank, 8), "w2_a": (12, rank), "w2_b": (rank, 8)}
    return {f"0.hada_{end}": draw(*shape, seed=i) for i, (end, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize(("rank", "kind"), [(2, LowRank), (3, Dense)])
def test_the_formula_of_loha(rank: int, kind: type[StructuredMatrix], tmp_path: Path):
    tensors = hadamard(rank)
    folder = folder_of(tmp_path / "a", tensors, peft_type="LOHA", r=rank, alpha=5, lora_alpha=0)
    a, b, c, d = tensors.values()
    model = one_layer()
    torch.testing.assert_close(change(model, folder), 5 / rank * (a @ b) * (c @ d))
    (branch,) = (part for part in model.modules() if isinstance(part, Branch))
    assert type(branch.matrix) is kind
    edited(folder, lambda config: config.update(alpha_pattern={"0": 3}))
    torch.testing.assert_close(change(one_layer(), folder), 3 / rank * (a @ b) * (c @ d))
    edited(folder, lambda config: config.update(r=4))
    with pytest.raises(ValueError, match=f"its rank is {rank}, but 4 in the description"):
        rankwise.load_adapter(one_layer(), folder)


def test_a_loha_of_another_shape_is_refused(tmp_path: Path):
    tensors = hadamard(2) | {"0.hada_w2_b": draw(2, 1)}  # would be broadcast
    folder = folder_of(tmp_path / "a", tensors, peft_type="LOHA", r=2, lora_alpha=0)
    with pytest.raises(ValueError, match="the two products have different shapes"):
        rankwise.load_adapter(one_layer(), folder)


@pytest.mark.parametrize("padding", [None, 4])
def test_the_formula_of_embeddings(padding: int | None, tmp_path: Path):
    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(9, 6, padding_idx=padding)).double()

    a, b = draw(2, 9, seed=1), draw(6, 2, seed=2)
    if padding is not None:
        a[:, padding] = 0  # no gradient reaches it in PEFT
    tensors = {"0.lora_embedding_A": a, "0.lora_embedding_B": b, "0.base_layer.weight": net()[0].weight.detach()}
    model, tokens = net(), torch.arange(9)
    rankwise.load_adapter(model, folder_of(tmp_path / "a", tensors, lora_dropout=0.5))
    expected = net()(tokens) + 8 / 2 * (b @ a).mT
    torch.testing.assert_close(model.eval()(tokens), expected)
    config, again = written(model, tmp_path / "b")
    assert config["target_modules"] == "0"
    assert {name: tuple(tensor.shape) for name, tensor in again.items()} == {
        "base_model.model.0.lora_embedding_A": (2, 9),
        "base_model.model.0.lora_embedding_B": (6, 2),
    }
    other = net()
    rankwise.load_adapter(other, tmp_path / "b")
    torch.testing.assert_close(other.eval()(tokens), expected)
    model(tokens).sum().backward()
    moved = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in moved.values())
    if padding is not None:
        assert not any(bool(g[:, padding].any()) for g in moved.values() if g is not None and g.shape == (2, 9))
    folder_of(tmp_path / "c", tensors | {"0.lora_magnitude_vector": draw(9)}, use_dora=True)
    with pytest.raises(ValueError, match="lengths of tokens, which is not supported"):
        rankwise.load_adapter(net(), tmp_path / "c")


def test_an_embedding_that_is_tied_is_named(tmp_path: Path):
    name = "model.embed_tokens"
    tensors = {f"{name}.lora_embedding_A": draw(2, 64), f"{name}.lora_embedding_B": draw(32, 2)}
    folder = folder_of(tmp_path / "a", tensors, target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match=r"embed_tokens alone, which shares its weight with another layer; give"):
        rankwise.load_adapter(llama(), folder)


def triplets(matrix: StructuredMatrix, rank: int) -> StructuredMatrix:
    m, n = matrix.shape
    inner = Product(Dense(draw(m, rank)), Diagonal(draw(rank)), Dense(draw(rank, n)))
    return Sum(Base(matrix), Branch(inner, 0.7))


def test_triplets_are_written_as_adalora(tmp_path: Path):
    model = net().requires_grad_(False)
    for (name, site), rank in zip(rankwise.core.surgery.select(model).items(), (3, 2), strict=True):
        assert name in ("0", "2.0")
        rankwise.core.surgery.replace(model, site, triplets(Dense(site.weight), rank))
    config, tensors = written(model, tmp_path / "a")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "base_model.model.0.lora_A": (3, 8),
        "base_model.model.0.lora_B": (12, 3),
        "base_model.model.0.lora_E": (3, 1),
        "base_model.model.2.0.lora_A": (2, 12),
        "base_model.model.2.0.lora_B": (8, 2),
        "base_model.model.2.0.lora_E": (2, 1),
    }
    wanted = {"peft_type": "ADALORA", "init_r": 3, "lora_alpha": pytest.approx(0.7 * (3 + 1e-5))}
    assert config | wanted == config
    assert config["rank_pattern"] == {"2.0.lora_E": [True, True, False]}
    again = net()
    rankwise.load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(again(draw(3, 8)), model(draw(3, 8)))


def test_patterns_go_by_the_first_that_matches(tmp_path: Path):
    patterns = {"rank_pattern": {"0": 3}, "alpha_pattern": {"nothing": 1, r"2\..": 9, "0": 6}}
    tensors = factors(r=3) | factors("2.0", 8, 12, r=3)
    folder = folder_of(tmp_path / "a", tensors, **patterns)
    model = net()
    rankwise.load_adapter(model, folder)
    scales = {name: layer.matrix.members[1].scale for name, layer in adapted(model).items()}
    assert scales == {"0": 6 / 3, "2.0": 9 / 3}


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_a_start_that_is_not_zero_is_written_with_twice_the_rank(alpha: float | None, tmp_path: Path):
    model, again = net(), net()
    method = Lora(rank=2, alpha=alpha, start=SingularVectors())
    rankwise.adapt(model, method, where=lambda name, layer: name == "0")
    branch = model[0].matrix.members[1]
    new, old = branch.matrix.members[0], branch.matrix.members[1].matrix.matrix
    moved(model)
    config, tensors = written(model, tmp_path / "a")
    assert (config["r"], config["lora_alpha"]) == (4, method.scale * 4)
    assert torch.equal(tensors["base_model.model.0.lora_A.weight"], torch.cat([new.right, old.right]).detach())
    assert torch.equal(tensors["base_model.model.0.lora_B.weight"], torch.cat([new.left, -old.left], 1).detach())
    rankwise.load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(again(draw(3, 8)), model(draw(3, 8)))


@pytest.mark.parametrize(
    ("build", "rank"),
    [
        (lambda base: Sum(base, Product(base, LowRank(draw(8, 1), draw(1, 8)))), 1),
        (
            lambda base: Product(
                Sum(Frozen(Dense(torch.eye(12).double())), LowRank(draw(12, 2), draw(2, 12))), base
            ),
            2,
        ),
        (lambda base: Sum(base, Product(Dense(draw(12, 2)), Dense(draw(2, 8)))), 2),
        (
            lambda base: Sum(
                base, LowRank(draw(12, 1), draw(1, 8)), Branch(LowRank(draw(12, 1), draw(1, 8)), 2.0)
            ),
            2,
        ),
        (lambda base: Sum(base, Branch(LowRank(draw(12, 8), draw(8, 8)))), 8),
    ],
)
def test_every_change_of_low_rank_is_a_lora(build, rank: int, tmp_path: Path):
    model, again = one_layer(), one_layer()
    site = rankwise.core.surgery.select(model)["0"]
    rankwise.core.surgery.replace(model, site, build(Base(Dense(site.weight))))
    config, _ = written(model, tmp_path / "a")
    assert (config["peft_type"], config["r"]) == ("LORA", rank)
    rankwise.load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(again(draw(3, 8)), model(draw(3, 8)))


def test_a_change_of_full_rank_is_refused(tmp_path: Path):
    model = one_layer()
    site = rankwise.core.surgery.select(model)["0"]
    rankwise.core.surgery.replace(model, site, Product(Diagonal(draw(12)), Base(Dense(site.weight))))
    with pytest.raises(ValueError, match=r"no low rank, or .*; write format='rankwise'.*exporters\.Lora"):
        rankwise.save(model, tmp_path / "a", format="peft")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("magnitudes", [False, True])
def test_convolutions(magnitudes: bool, tmp_path: Path):
    def image_net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 6, (3, 2), stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 5))

    model, again = image_net(), image_net()
    rankwise.adapt(model, Lora(rank=2, magnitudes=magnitudes), where=lambda name, layer: name == "0")
    _, tensors = written(moved(model), tmp_path / "a")
    shapes = {name.removeprefix("base_model.model.0."): tuple(tensor.shape) for name, tensor in tensors.items()}
    expected: dict[str, tuple[int, ...]] = {"lora_A.weight": (2, 3, 3, 2), "lora_B.weight": (6, 2, 1, 1)}
    assert shapes == expected | ({"lora_magnitude_vector": (1, 6, 1, 1)} if magnitudes else {})
    rankwise.load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(again(draw(2, 3, 7, 7).float()), model(draw(2, 3, 7, 7).float()))


def test_dilated_convolutions_are_left_out_because_peft_does_not_dilate(tmp_path: Path):
    def dilated(dilation: int = 2) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3, dilation=dilation, padding="same"))

    model, plain = dilated(), dilated(1)
    rankwise.adapt(model, Lora(rank=2))
    with pytest.raises(ValueError, match=r"layer 0: .* PEFT does not know this kind of layer"):
        rankwise.save(model, tmp_path / "a", format="peft")
    rankwise.adapt(plain, Lora(rank=2))
    folder = rankwise.save(moved(plain), tmp_path / "b", format="peft")
    with pytest.raises(ValueError, match=r"layer 0 in .* PEFT computes another change .* dilation"):
        rankwise.load_adapter(dilated(), folder)


def test_transposed_layers_modules_and_biases(tmp_path: Path):
    torch.manual_seed(3)
    model = gpt2().eval()
    torch.manual_seed(3)
    again = gpt2().eval()
    also = lambda name: "ln_f" in name or name == "transformer.h.0.attn.c_attn.bias"  # noqa: E731
    rankwise.adapt(model, Lora(rank=2), where=lambda name, layer: "c_attn" in name, also=also)
    config, tensors = written(moved(model), tmp_path / "a")
    assert config["fan_in_fan_out"]
    assert config["modules_to_save"] == ["transformer.ln_f"]
    assert config["bias"] == "lora_only"
    assert {name for name in tensors if "lora" not in name} == {
        "base_model.model.transformer.ln_f.weight",
        "base_model.model.transformer.ln_f.bias",
        "base_model.model.transformer.h.0.attn.c_attn.base_layer.bias",
        "base_model.model.transformer.h.1.attn.c_attn.base_layer.bias",
    }
    assert tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"].shape == (96, 2)
    rankwise.load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(again(ids()).logits, model(ids()).logits)
    trained = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert {"transformer.ln_f.weight", "transformer.h.0.attn.c_attn.bias"} < trained


def encoder(build: type[nn.Module], config: type[Any]) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    return build(config(**sizes, num_hidden_layers=1, max_position_embeddings=40, num_labels=3)).eval()


def roberta() -> nn.Module:
    """A classifier whose head has two layers inside."""
    return encoder(RobertaForSequenceClassification, RobertaConfig)


def bert() -> nn.Module:
    return encoder(BertForSequenceClassification, BertConfig)


@pytest.mark.parametrize(
    ("build", "saved", "layer"),
    [
        (roberta, ["classifier", "score"], "roberta.encoder.layer.0.attention.self.query"),
        (llama, ["mlp"], "model.layers.0.self_attn.q_proj"),
    ],
)
def test_saved_modules_with_modules_inside(build, saved: list[str], layer: str, tmp_path: Path):
    model, again = build(), build()
    inside = [name for name, _ in model.named_parameters() if any(f".{m}." in f".{name}" for m in saved)]
    assert all(name.split(".")[-2] not in saved for name in inside)
    rankwise.adapt(model, Lora(rank=2), where=lambda name, _: name == layer, also=lambda name: name in inside)
    rankwise.save(moved(model), tmp_path / "a", format="peft")
    config, tensors = json.loads((tmp_path / "a" / CONFIG).read_text()), load_file(tmp_path / "a" / TENSORS)
    assert config["modules_to_save"] == sorted(name.rpartition(".")[0] for name in inside if "weight" in name)
    more = {"task_type": "SEQ_CLS"} if build is roberta else {}
    plain = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    fields = {"target_modules": [layer], "modules_to_save": saved, "lora_alpha": config["lora_alpha"]}
    folder = folder_of(tmp_path / "b", plain, **fields, **more)
    assert rankwise.load_adapter(again, folder).totals["unexpected"] == []
    torch.testing.assert_close(again(ids()).logits, model(ids()).logits)
    other = build()
    rankwise.load_adapter(other, tmp_path / "a")
    torch.testing.assert_close(other(ids()).logits, model(ids()).logits)


def test_two_saved_modules_whose_names_end_alike(tmp_path: Path):
    def heads() -> nn.Module:
        torch.manual_seed(0)
        names = ("query", "pre_classifier", "classifier")
        return nn.Sequential(OrderedDict((name, nn.Linear(8, 8)) for name in names)).double()

    model, again = heads(), heads()
    rankwise.adapt(
        model, Lora(rank=2), where=lambda name, layer: name == "query", also=lambda name: "classifier" in name
    )
    config, _ = written(moved(model), tmp_path / "a")
    assert config["modules_to_save"] == ["classifier", "pre_classifier"]
    rankwise.load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(again(draw(3, 8)), model(draw(3, 8)))
    alone = heads()
    rankwise.adapt(
        alone,
        Lora(rank=2),
        where=lambda name, layer: name == "query",
        also=lambda name: name.startswith("classifier"),
    )
    with pytest.raises(ValueError, match="PEFT would take pre_classifier for classifier"):
        rankwise.save(alone, tmp_path / "b", format="peft")


@pytest.mark.parametrize(
    ("build", "also", "task"),
    [
        (gpt2, None, "CAUSAL_LM"),
        (lambda: llama().model, None, "FEATURE_EXTRACTION"),
        (lambda: LlamaForSequenceClassification(llama().config), "score", "SEQ_CLS"),
        (bert, "classifier", "SEQ_CLS"),
        (bert, None, None),  # PEFT would look for a classifier in the file
        (roberta, "classifier", None),  # and for one where there are two modules inside
        (net, None, None),
    ],
)
def test_the_task_is_written_where_peft_then_finds_what_it_expects(build, also, task: str | None, tmp_path: Path):
    model = build()
    first = next(iter(rankwise.core.surgery.select(model)))
    rankwise.adapt(
        model,
        Lora(rank=2),
        where=lambda name, layer: name == first,
        also=None if also is None else lambda name: also in name,
    )
    rankwise.save(model, tmp_path / "a", format="peft")
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["task_type"] == task


def test_another_base_is_refused(tmp_path: Path):
    model = one_layer()
    rankwise.adapt(model, Lora(rank=2))
    folder = rankwise.save(moved(model), tmp_path / "a", format="peft")
    other, wide = one_layer(), nn.Sequential(nn.Linear(9, 12)).double()
    with torch.no_grad():
        other[0].weight[3, 5] += 1e-3
    with pytest.raises(ValueError, match=r"was made for other values of the layers under it: 0\."):
        rankwise.load_adapter(other, folder)
    with pytest.raises(ValueError, match=r"layer 0 is \(12, 9\) .* but \(12, 8\) .* belongs to another model"):
        rankwise.load_adapter(wide, folder)
    assert rankwise.load_adapter(other, folder, strict=False).totals["others"] == ["0"]
    edited(folder, lambda records: records.update({"0": {"shape": [12, 8]}}), BASES)
    with pytest.raises(ValueError, match=f"{BASES} holds a damaged entry .* of 0; get it again"):
        rankwise.load_adapter(one_layer(), folder)
    (folder / BASES).unlink()  # as PEFT writes it
    other = one_layer()
    nn.init.ones_(other[0].weight)
    assert rankwise.load_adapter(other, folder).totals["others"] == []


def test_tied_embeddings_stay_tied(tmp_path: Path):
    model, again = llama(), llama()
    rankwise.adapt(model, Lora(rank=2), also=lambda name: "embed" in name)
    config, tensors = written(moved(model), tmp_path / "a")
    assert (config["modules_to_save"], config["ensure_weight_tying"]) == (["model.embed_tokens"], True)
    assert {name for name in tensors if "lora" not in name} == {
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.lm_head.weight",
    }
    rankwise.load_adapter(again, tmp_path / "a")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    torch.testing.assert_close(again(ids()).logits, model(ids()).logits)
    content = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps(content | {"ensure_weight_tying": False}))
    with pytest.raises(ValueError, match=r"lm_head.weight is tied to a parameter that was trained without it"):
        rankwise.load_adapter(llama(), tmp_path / "a")


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (factors(), {"peft_type": "IA3"}, "of type 'IA3'"),
        (factors(), {"use_qalora": True}, "asks for use_qalora = True"),
        (factors(), {"trainable_token_indices": [1]}, "asks for trainable_token_indices"),
        (factors(), {"init_lora_weights": "pissa"}, "PEFT changes the base itself"),
        (
            factors(),
            {"target_modules": ["0"]},
            r"lacks .*: base_model.model.2.0.lora_A.weight, base_model.model.2.0",
        ),
        (factors(), {"target_modules": "all-linear"}, "lacks"),
        (
            factors(),
            {"target_modules": "*0("},
            r"target_modules = '\*0\(', which is no regular",
        ),
        (factors(), {"target_modules": 3}, r"adapter_config\.json has target_modules = 3, which must be names"),
        (
            factors(),
            {"target_modules": "0", "rank_pattern": {"(": 2}},
            r"rank_pattern = '\(', which is no",
        ),
        (
            factors(),
            {"target_modules": "0", "use_dora": True},
            "use_dora in the description and the tensors disagree",
        ),
        (factors(r=3), {"target_modules": "0"}, "rank is 3, but 2 in the description"),
        (factors(m=11), {"target_modules": "0"}, "layer 0 in .* does not fit"),
        (
            factors() | {"9.lora_A.weight": draw(2, 8)},
            {"target_modules": "0"},
            "nothing .* reads: .*9.lora_A.weight",
        ),
        ({"0.lora_A.weight": draw(2, 8)}, {"target_modules": "0"}, "lacks .*: base_model.model.0.lora_B.weight"),
        (factors() | {"0.bias": draw(12)}, {"target_modules": "0"}, "nothing .* reads: base_model.model.0.bias"),
    ],
)
def test_what_does_not_fit_is_refused(
    tensors: dict[str, Tensor], config: dict[str, Any], message: str, tmp_path: Path
):
    folder, model = folder_of(tmp_path / "a", tensors, **config), net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        rankwise.load_adapter(model, folder)
    assert "\n" not in str(caught.value)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_pickled_tensors_are_named(tmp_path: Path):
    folder = folder_of(tmp_path / "a", factors())
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(
        ValueError, match=r"adapter_model\.bin is of an older PEFT.*load it with PEFT and save it"
    ):
        rankwise.load_adapter(one_layer(), folder)


def test_layers_by_number_and_exclusion(tmp_path: Path):
    tensors = factors("model.layers.1.self_attn.q_proj", 32, 32)
    more = {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1], "exclude_modules": ["k_proj"]}
    report = rankwise.load_adapter(llama(), folder_of(tmp_path / "a", tensors, **more))
    assert [row["name"] for row in report.rows] == ["model.layers.1.self_attn.q_proj"]


def test_not_strict_names_what_is_wrong(tmp_path: Path):
    tensors = factors() | {"9.lora_A.weight": draw(2, 8)}
    report = rankwise.load_adapter(net(), folder_of(tmp_path / "a", tensors), strict=False)
    assert [row["name"] for row in report.rows] == ["0"]
    assert report.totals["missing"] == [f"base_model.model.2.0.lora_{part}.weight" for part in "AB"]
    assert report.totals["unexpected"] == ["base_model.model.9.lora_A.weight"]


def test_layers_that_differ_in_what_has_one_setting_are_refused(tmp_path: Path):
    model = net()
    rankwise.adapt(model, Lora(rank=2), where=lambda name, layer: name == "0")
    rankwise.adapt(model, Lora(rank=2, magnitudes=True), where=lambda name, layer: name == "2.0")
    with pytest.raises(ValueError, match="the layers differ"):
        rankwise.save(model, tmp_path / "a", format="peft")
