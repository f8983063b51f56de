"""The project's own files of adapters: strict, bit by bit, and never half applied."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import gpt2, ids, llama
from torch import nn

import rankwise
from rankwise.adapters import Lora
from rankwise.compressors import PlainSvd
from rankwise.matrices import Base, Branch, Dense, Diagonal, Frozen, LowRank, Product, Sum

TENSORS = "rankwise_adapter.safetensors"
CONFIG = "rankwise_adapter.json"


def trained(model: nn.Module) -> nn.Module:
    """The model with other values of what trains."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    model = llama()
    rankwise.adapt(model, Lora(rank=2), where=lambda name, layer: name.endswith("q_proj"))
    return rankwise.save(trained(model), folder, format="rankwise")


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


def refused(model: nn.Module, folder: Path, message: str) -> None:
    """Check for one line that says what is wrong, and a model that is as before."""
    before, flags = model.state_dict(), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message) as caught:
        rankwise.load_adapter(model, folder)
    assert "\n" not in str(caught.value)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert flags == [p.requires_grad for p in model.parameters()]


def changed(folder: Path, change: Callable[[dict], object]) -> None:
    content = json.loads((folder / CONFIG).read_text())
    change(content)
    (folder / CONFIG).write_text(json.dumps(content))


@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_language_model_computes_the_same_again(build: Callable[[], nn.Module], tmp_path: Path):
    torch.manual_seed(3)
    model = build()
    torch.manual_seed(3)
    again = build().train(model.training)
    rankwise.adapt(model, Lora(rank=2, magnitudes=True), also=lambda name: "norm" in name or "ln" in name)
    rankwise.save(trained(model), tmp_path / "a", format="rankwise")
    rankwise.load_adapter(again, tmp_path / "a")
    model.eval(), again.eval()
    assert torch.equal(model(ids()).logits, again(ids()).logits)


def test_a_compressed_base_is_needed_where_one_was_adapted(tmp_path: Path):
    def compressed() -> nn.Module:
        model = llama()
        rankwise.compress(model, PlainSvd(), keep=0.7)
        return model

    model, again = compressed(), compressed()
    rankwise.adapt(model, Lora(rank=2))
    rankwise.save(trained(model), tmp_path / "a", format="rankwise")
    rankwise.load_adapter(again, tmp_path / "a")
    assert torch.equal(model(ids()).logits, again(ids()).logits)
    refused(llama(), tmp_path / "a", "other values of the layers under it")


def test_a_base_in_half_precision_is_the_same_as_its_float32_copy(tmp_path: Path):
    model = llama().bfloat16()
    again = llama().bfloat16().float()
    rankwise.adapt(model, Lora(rank=2))
    rankwise.save(trained(model), tmp_path / "a", format="rankwise")
    assert rankwise.load_adapter(again, tmp_path / "a").totals["others"] == []
    assert {p.dtype for p in again.parameters()} == {torch.float32}


def test_what_layers_share_is_written_once_and_shared_again(tmp_path: Path):
    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))

    model = net()
    rankwise.adapt(model, Lora(rank=2))
    model[2].matrix.members[1].matrix.left = model[0].matrix.members[1].matrix.left
    rankwise.save(model, tmp_path / "a", format="rankwise")
    assert len(load_file(tmp_path / "a" / TENSORS)) == 3
    again = net()
    rankwise.load_adapter(again, tmp_path / "a")
    assert again[2].matrix.members[1].matrix.left is again[0].matrix.members[1].matrix.left
    assert again[2].matrix.members[1].matrix.right is not again[0].matrix.members[1].matrix.right


def test_what_was_frozen_on_the_way_stays_frozen(tmp_path: Path):
    model, again = nn.Sequential(nn.Linear(6, 6)), nn.Sequential(nn.Linear(6, 6))
    again.load_state_dict(model.state_dict())
    rankwise.adapt(model, Lora(rank=2))
    update = model[0].matrix.members[1].matrix
    update.right.requires_grad_(False)
    rankwise.save(model, tmp_path / "a", format="rankwise")
    rankwise.load_adapter(again, tmp_path / "a")
    found = again[0].matrix.members[1].matrix
    assert (found.left.requires_grad, found.right.requires_grad) == (True, False)


def test_a_whole_model_with_adapters_is_refused(tmp_path: Path):
    model = llama()
    rankwise.adapt(model, Lora(rank=2))
    with pytest.raises(ValueError, match=r"fold.*format='rankwise' or format='peft'"):
        rankwise.save(model, tmp_path / "a")
    with pytest.raises(ValueError, match="format must be"):
        rankwise.save(model, tmp_path / "a", format="gguf")
    with pytest.raises(ValueError, match="has no adapter"):
        rankwise.save(llama(), tmp_path / "a", format="rankwise")
    assert not list(tmp_path.iterdir())


def test_another_base_is_refused(folder: Path):
    other = llama()
    with torch.no_grad():
        other.model.layers[1].self_attn.q_proj.weight[0, 0] += 1
    refused(other, folder, r"other values of the layers under it: model.layers.1.self_attn.q_proj\.")
    report = rankwise.load_adapter(other, folder, strict=False)
    assert report.totals["others"] == ["model.layers.1.self_attn.q_proj"]
    assert len(report.rows) == 2


def test_another_shape_is_refused(folder: Path):
    refused(llama(hidden_size=64), folder, r"\(64, 64\) in the model, but \(32, 32\)")


def test_a_layer_that_does_not_exist_is_refused(folder: Path):
    refused(llama(num_hidden_layers=1), folder, r"nothing in this model reads: model.layers.1.self_attn.q_proj")
    report = rankwise.load_adapter(llama(num_hidden_layers=1), folder, strict=False)
    assert len(report.totals["unexpected"]) == 2
    assert [row["name"] for row in report.rows] == ["model.layers.0.self_attn.q_proj"]


def test_a_file_that_is_cut_short_is_refused(folder: Path):
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[: len(content) // 2])
    refused(llama(), folder, "cut short")
    (folder / TENSORS).unlink()
    refused(llama(), folder, "missing")


def test_missing_and_unexpected_tensors_are_listed(folder: Path):
    tensors = load_file(folder / TENSORS)
    gone = next(
        name for name in tensors if name.endswith("layers.0.self_attn.q_proj.matrix.members.1.matrix.left")
    )
    rest = {name: tensor for name, tensor in tensors.items() if name != gone}
    save_file(rest, folder / TENSORS)
    refused(llama(), folder, f"lacks tensors that the adapter needs: {gone}")
    report = rankwise.load_adapter(llama(), folder, strict=False)
    assert report.totals["missing"] == [gone]
    assert [row["name"] for row in report.rows] == ["model.layers.1.self_attn.q_proj"]
    save_file(tensors | {"extra": torch.zeros(1)}, folder / TENSORS)
    refused(llama(), folder, "nothing in this model reads: extra")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(version=99), "version 99"),
        (lambda content: content.update(layers=[3]), "damaged entry '3'"),
        (
            lambda content: content["layers"][0].update(spec={"kind": "Nothing"}),
            "unknown kind of matrix 'Nothing'",
        ),
        (lambda content: content["layers"][0].update(spec={"kind": "Base"}), r"nothing in this model reads"),
        (
            lambda content: content["layers"][0]["spec"]["members"][1]["matrix"].update(rank=3),
            r"is \(32, 2\) in the file, but the model asks for \(32, 3\)",
        ),
        (lambda content: content["layers"][0].update(spec={"kind": "Diagonal", "size": 32}), "is no adapter"),
        (lambda content: content.update(whole=5), "a damaged 'whole', 5; get it again"),
        (lambda content: content.update(whole=[5]), "a damaged 'whole'"),
        (lambda content: content.update(shared=[]), "a damaged 'shared'"),
        (lambda content: content.update(shared={"a": 1}), "a damaged 'shared'"),
        (lambda content: content.update(turned=[1]), "a damaged 'turned'"),
        (lambda content: content.update(turned={"a": "yes"}), "a damaged 'turned'"),
        (lambda content: content["layers"][0].update(lr="fast"), "damaged entry"),
        (lambda content: content["layers"][0].update(lr=-1.0), "damaged entry"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(folder: Path, change: Callable[[dict], object], message: str):
    changed(folder, change)
    refused(llama(), folder, message)


@pytest.mark.parametrize("name", [None, "a"])
def test_not_strict_some_layer_must_get_an_adapter(name: str | None, folder: Path):
    changed(folder, lambda content: content.update(layers=[]))
    model = llama()
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="holds no adapter of a layer of this model"):
        rankwise.load_adapter(model, folder, strict=False, name=name)
    assert flags == [p.requires_grad for p in model.parameters()]


def test_damaged_files_are_refused(folder: Path):
    (folder / CONFIG).write_text("{")
    refused(llama(), folder, "is damaged")
    (folder / CONFIG).unlink()
    refused(llama(), folder, "neither")


def test_numbers_that_are_not_finite_are_refused(folder: Path):
    tensors = load_file(folder / TENSORS)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, folder / TENSORS)
    refused(llama(), folder, "NaN or infinity")


def test_a_second_adapter_is_refused(folder: Path):
    model = llama()
    rankwise.load_adapter(model, folder)
    with pytest.raises(ValueError, match="has an adapter already"):
        rankwise.load_adapter(model, folder)


def test_a_base_that_trains_is_refused(tmp_path: Path):
    model = llama()
    rankwise.adapt(model, Lora(rank=2))
    next(part for part in model.modules() if isinstance(part, Base)).requires_grad_(True)
    with pytest.raises(ValueError, match="trains, though it is under an adapter"):
        rankwise.save(model, tmp_path / "a", format="rankwise")


def test_one_base_may_stand_in_several_places(tmp_path: Path):
    model, again = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    again.load_state_dict(model.state_dict())
    rankwise.adapt(model, Lora(rank=2))
    base = next(part for part in model.modules() if isinstance(part, Base))
    turned = Product(Frozen(Dense(torch.eye(4))), base, Diagonal(torch.ones(4)))
    model[0].matrix = Sum(base, Branch(LowRank(torch.ones(4, 1), torch.ones(1, 4))), turned)
    rankwise.save(model, tmp_path / "a", format="rankwise")
    rankwise.load_adapter(again, tmp_path / "a")
    x = torch.randn(3, 4)
    assert torch.equal(again(x), model(x))
    assert len({id(part.matrix) for part in again.modules() if isinstance(part, Base)}) == 1
