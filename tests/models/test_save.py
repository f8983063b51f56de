"""What is saved is what plain transformers loads, after ``import rankwise`` and only then."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

import rankwise
from rankwise.compressors import OrthogonalDictionary
from rankwise.core.surgery import fold, replace, select, structured
from rankwise.matrices import Dense, Diagonal, LowRank, Permutation, PivotedLowRank, Product, Scaled, Sum
from rankwise.models import load, predicted_bytes, save

IDS = torch.arange(12).view(2, 6)
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **HEADS, **changes})).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)).eval()


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {**SMALL, "num_attention_heads": 4, "max_position_embeddings": 64}
    return BertForSequenceClassification(BertConfig(**sizes)).eval()


def shared(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Two layers of a model, with biases of their own, share one weight."""
    first, second = (model.get_submodule(f"model.layers.{i}.self_attn.q_proj") for i in (0, 1))
    second.weight = first.weight
    return model


def compress(model: PreTrainedModel, kind=PivotedLowRank, rank: int = 5) -> PreTrainedModel:
    """Cut every layer to a rank and fill the biases, so that a lost one shows."""
    for site in select(model).values():
        left, gains, right = torch.linalg.svd(site.weight.float(), full_matrices=False)
        r = min(rank, len(gains))
        factors = ((left[:, :r] * gains[:r]).to(site.weight.dtype), right[:r].to(site.weight.dtype))
        replace(model, site, kind.from_factors(*factors))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def output(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def same(a: Tensor, b: Tensor) -> None:
    """Equal up to the order of sums: a matrix that was loaded may lie in memory differently."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 if a.dtype == torch.float32 else 1e-2)


def in_new_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def change(folder: Path, edit) -> None:
    """Change the quantization_config of a saved model."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config["quantization_config"])
    path.write_text(json.dumps(config))


def refused(folder: Path, edits) -> None:
    """Each change of the quantization_config is refused with its message, in one line."""
    original = (folder / "config.json").read_text()
    for message, edit in edits.items():
        (folder / "config.json").write_text(original)
        change(folder, edit)
        with pytest.raises(ValueError, match=message) as caught:
            load(folder)
        assert "\n" not in str(caught.value)
        with pytest.raises((ValueError, RuntimeError)):
            AutoModelForCausalLM.from_pretrained(folder)


CASES = {
    "llama": (llama, PivotedLowRank),
    "llama factors": (llama, LowRank),
    "llama tied": (lambda: llama(tie_word_embeddings=True), PivotedLowRank),
    "llama with biases": (lambda: llama(attention_bias=True, mlp_bias=True), PivotedLowRank),
    "llama bfloat16": (lambda: llama().bfloat16(), PivotedLowRank),
    "llama shared": (lambda: shared(llama(attention_bias=True)), PivotedLowRank),
    "gpt2": (gpt2, PivotedLowRank),
    "bert": (bert, PivotedLowRank),
    "llama dense": (lambda: llama(tie_word_embeddings=True), None),
    "llama dense shared": (lambda: shared(llama()), None),
    "bert dense": (bert, None),
}


@pytest.mark.parametrize("case", CASES)
def test_save_then_load_is_the_same_model_of_the_predicted_size(case, tmp_path):
    make, kind = CASES[case]
    model = make() if kind is None else compress(make(), kind)
    folder = save(model, tmp_path / "out")
    assert predicted_bytes(model) == pytest.approx((folder / "model.safetensors").stat().st_size, abs=8)
    other, tokenizer = load(folder)
    assert type(other) is type(model)
    assert tokenizer is None
    assert not other.training
    assert structured(other).keys() == structured(model).keys()
    mine, theirs = model.state_dict(), other.state_dict()
    assert {name: (t.dtype, t.shape) for name, t in mine.items()} == {
        n: (t.dtype, t.shape) for n, t in theirs.items()
    }
    assert all(torch.equal(theirs[name], tensor) for name, tensor in mine.items())
    same(output(other), output(model))
    assert all(parameter.requires_grad for parameter in other.parameters())


def test_every_expression_comes_back(tmp_path):
    torch.manual_seed(1)
    model = llama()
    sites = list(select(model).values())
    for site in sites[:3]:
        m, n = site.weight.shape
        low = LowRank(torch.randn(m, 2), torch.randn(2, n))
        around = Product(Diagonal(torch.randn(m)), Dense(torch.randn(m, n)), Permutation(torch.randperm(n)))
        replace(model, site, Sum(low, Scaled(around, 0.5)))
    other, _ = load(save(model, tmp_path / "out"))
    same(output(other), output(model))


def test_a_shared_matrix_is_written_once_and_shared_again(tmp_path):
    model = compress(shared(llama()))
    alone = compress(llama())
    assert predicted_bytes(model) < predicted_bytes(alone)
    folder = save(model, tmp_path / "out")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if "layers.1.self_attn.q_proj.matrix" in name]  # noqa: SIM118
    for other in (load(folder)[0], AutoModelForCausalLM.from_pretrained(folder)):
        first, second = (structured(other)[f"model.layers.{i}.self_attn.q_proj"] for i in (0, 1))
        assert first.matrix is second.matrix
        same(output(other), output(model))


def sharing_atoms(model: PreTrainedModel) -> PreTrainedModel:
    """Compress so that the layers of two blocks share parts of their matrices."""
    rankwise.compress(model, OrthogonalDictionary(layers=2), keep=0.6, data=IDS)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [llama, lambda: llama(tie_word_embeddings=True), lambda: llama().bfloat16(), gpt2, bert]
)
def test_a_part_that_layers_share_is_written_once_and_shared_again(make, tmp_path):
    model = sharing_atoms(make())
    folder = save(model, tmp_path / "out")
    assert predicted_bytes(model) == pytest.approx((folder / "model.safetensors").stat().st_size, abs=8)
    other, _ = load(folder)
    mine, theirs = structured(model), structured(other)
    assert mine.keys() == theirs.keys()
    shared = 0
    for (one, first), (two, second) in itertools.combinations(mine.items(), 2):
        for i, j in itertools.product(range(2), range(2)):
            is_shared = first.matrix.parts[i] is second.matrix.parts[j]
            assert (theirs[one].matrix.parts[i] is theirs[two].matrix.parts[j]) == is_shared
            shared += is_shared
    assert shared == len(mine) // 2
    same(output(other), output(model))
    other.save_pretrained(tmp_path / "plain")  # by transformers alone
    same(output(load(tmp_path / "plain")[0]), output(model))
    again = save(other, tmp_path / "again")
    assert (again / "model.safetensors").stat().st_size == (folder / "model.safetensors").stat().st_size
    same(output(load(again)[0]), output(model))
    dense = rankwise.export(folder, rankwise.exporters.Dense(), tmp_path / "dense")
    same(output(type(model).from_pretrained(dense)), output(fold(model)))


def test_a_weight_that_layers_share_may_share_parts_with_others(tmp_path):
    model = llama(num_hidden_layers=3)
    first, second = (model.get_submodule(f"model.layers.{i}.mlp.up_proj") for i in (1, 2))
    second.weight = first.weight
    sharing_atoms(model)
    layers = structured(model)
    one, two, three = (layers[f"model.layers.{i}.mlp.up_proj"].matrix for i in range(3))
    assert two is three
    assert one.parts[1] is two.parts[1]
    folder = save(model, tmp_path / "out")
    same(output(load(folder)[0]), output(model))
    dense = rankwise.export(folder, rankwise.exporters.Dense(), tmp_path / "dense")
    same(output(LlamaForCausalLM.from_pretrained(dense)), output(fold(model)))


def test_damaged_records_of_what_is_shared_are_refused(tmp_path):
    save(sharing_atoms(llama()), tmp_path / "out")

    def of(quantization):
        return next(entry for entry in quantization["matrices"] if "shared" in entry)

    written = json.loads((tmp_path / "out" / "config.json").read_text())
    owner = of(written["quantization_config"])["shared"].popitem()[1]
    edits = {
        "damaged entry": lambda q: of(q).update(shared=3),
        "damaged entry .*nowhere": lambda q: of(q).update(shared={"members.0": "nowhere"}, spec=None),
        "nowhere, which is none": lambda q: of(q).update(shared={"members.0": ["nowhere", "members.0"]}),
        "both said to be elsewhere": lambda q: of(q).update(shared={"": owner, "members.1": owner}),
        r"members\.7": lambda q: of(q).update(shared={"members.7": owner}),
        r"said to be .* differ": lambda q: of(q).update(shared={"members.0": owner, "members.1": owner}),
        "is not in the checkpoint": lambda q: of(q).pop("shared"),
    }
    refused(tmp_path / "out", edits)


def test_tied_embeddings_are_written_once_and_stay_tied(tmp_path):
    model = compress(llama(tie_word_embeddings=True))
    folder = save(model, tmp_path / "out")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    other, _ = load(folder)
    assert other.lm_head.weight is other.model.embed_tokens.weight


def test_a_model_of_experts_keeps_the_names_that_other_tools_read(tmp_path):
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SMALL, **HEADS, num_local_experts=2)).eval()
    other, _ = load(save(model, tmp_path / "dense"))
    same(output(other), output(model))
    with safe_open(tmp_path / "dense" / "model.safetensors", framework="pt") as file:
        assert any("experts.0.w1.weight" in name for name in file.keys())  # noqa: SIM118
    compress(model)
    other, _ = load(save(model, tmp_path / "out"))
    same(output(other), output(model))


@pytest.mark.slow
def test_a_new_process_needs_the_import_and_nothing_else(tmp_path):
    model = compress(llama(tie_word_embeddings=True))
    save(model, tmp_path / "out")
    save_file({"logits": output(model)}, tmp_path / "expected.safetensors")
    code = f"""
from transformers import AutoModelForCausalLM
{{}}
import torch
from safetensors.torch import load_file
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r}).eval()
with torch.no_grad():
    logits = model(torch.arange(12).view(2, 6)).logits
print("difference", float((logits - load_file({str(tmp_path / "expected.safetensors")!r})["logits"]).abs().max()))
"""
    for with_import in (code.format("import rankwise"), "import rankwise\n" + code.format("")):
        done = in_new_process(with_import)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout.split("difference ")[1]) <= 1e-6
    without = in_new_process(code.format(""))
    assert without.returncode != 0
    assert "mismatch" in without.stderr.lower()


def test_a_loaded_model_is_an_ordinary_one(tmp_path):
    model = compress(llama())
    save(model, tmp_path / "one")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert output(other.double()).dtype == torch.float64
    other.float().save_pretrained(tmp_path / "two")  # by transformers alone
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    same(output(again), output(model))
    save(fold(again), tmp_path / "folded")
    assert "quantization_config" not in json.loads((tmp_path / "folded" / "config.json").read_text())
    same(output(load(tmp_path / "folded")[0]), output(model))


@pytest.mark.parametrize("small", [compress, sharing_atoms])
def test_the_body_alone_can_be_loaded(small, tmp_path):
    model = small(llama())
    body = AutoModel.from_pretrained(save(model, tmp_path / "out"))
    with torch.no_grad():
        same(body(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_the_type_can_be_chosen_and_indices_stay_integers(tmp_path):
    save(compress(llama()), tmp_path / "out")
    other, _ = load(tmp_path / "out", dtype=torch.bfloat16)
    types = {t.dtype for t in other.state_dict().values()}
    assert types == {torch.bfloat16, torch.int32}


def test_saving_leaves_the_model_as_it_was(tmp_path):
    model = compress(llama())
    before = model.config.to_dict()
    save(model, tmp_path / "out")
    after = model.config.to_dict()
    assert {**after, "architectures": None, "dtype": None} == {**before, "architectures": None, "dtype": None}


def test_specs_of_a_wrong_shape_or_layer_are_refused(tmp_path):
    save(compress(llama(), LowRank), tmp_path / "out")
    name = "model.layers.0.self_attn.k_proj"

    def entry(quantization):
        return next(group for group in quantization["matrices"] if name in group["names"])

    edits = {
        rf"{name}.*\(16, 32\).*\(16, 33\)": lambda q: entry(q)["spec"].update(shape=[16, 33]),
        f"{name}.*Nonsense": lambda q: entry(q)["spec"].update(kind="Nonsense"),
        f"{name}.*rank": lambda q: entry(q)["spec"].update(rank=10**12),
        f"{name}.*shape": lambda q: entry(q)["spec"].update(shape="huge"),
        "nowhere": lambda q: entry(q).update(names=["model.layers.0.nowhere"]),
        "model.norm": lambda q: entry(q).update(names=["model.norm"]),
        "embed_tokens": lambda q: entry(q).update(names=["model.embed_tokens"]),
        "damaged entry": lambda q: q["matrices"].append({"names": [3], "spec": {}}),
        "matrices": lambda q: q.update(matrices=7),
        "version|format": lambda q: q.update(version=99),
        f"{name}.*twice": lambda q: q["matrices"].append(dict(entry(q))),
        r"model\.layers\.0\.self_attn\.k_proj\.matrix\.left": lambda q: entry(q)["spec"].update(rank=4),
        r"model\.layers\.0\.self_attn\.k_proj": lambda q: q["matrices"].remove(entry(q)),
    }
    refused(tmp_path / "out", edits)


@pytest.mark.parametrize("damage", ["missing", "shape", "kind", "order"])
def test_damaged_tensors_are_refused(damage, tmp_path):
    save(compress(llama()), tmp_path / "out")
    file, layer = tmp_path / "out" / "model.safetensors", "model.layers.1.mlp.down_proj"
    tensors = load_file(file)
    if damage == "missing":
        del tensors[f"{layer}.matrix.mix"]
    elif damage == "shape":
        tensors[f"{layer}.matrix.mix"] = torch.zeros(3, 3)
    elif damage == "kind":
        tensors[f"{layer}.matrix.mix"] = tensors[f"{layer}.matrix.mix"].int()
    else:
        tensors[f"{layer}.matrix.order"][0] = 10**6
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{layer}\.matrix") as caught:
        load(tmp_path / "out")
    assert "\n" not in str(caught.value)
    with pytest.raises((ValueError, RuntimeError), match=rf"{layer}\.matrix|mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("moment", ["write", "verify", "interrupt"])
def test_a_failure_leaves_nothing_behind(moment, tmp_path, monkeypatch):
    model = compress(llama())
    config = model.config.to_dict()
    real = LlamaForCausalLM.save_pretrained

    def fails(self, folder, **arguments):
        real(self, folder, **arguments)
        if moment == "interrupt":
            raise KeyboardInterrupt
        if moment == "write":
            raise OSError(28, "No space left on device")
        file = Path(folder) / "model.safetensors"
        tensors = load_file(file)
        tensors["model.norm.weight"][0] += 1
        save_file(tensors, file)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fails)
    with pytest.raises((OSError, ValueError, KeyboardInterrupt)):
        save(model, tmp_path / "out")
    assert left_behind(tmp_path) == []
    assert model.config.to_dict().get("quantization_config") == config.get("quantization_config")


def test_a_folder_that_holds_something_is_not_touched(tmp_path):
    model = llama()
    (tmp_path / "out").mkdir()
    save(model, tmp_path / "out")  # an empty folder is taken
    before = left_behind(tmp_path / "out")
    with pytest.raises(ValueError, match="out exists already"):
        save(model, tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file exists already"):
        save(model, tmp_path / "file")
    assert left_behind(tmp_path / "out") == before
    assert left_behind(tmp_path) == ["file", "out"]


def test_other_modules_are_refused(tmp_path):
    with pytest.raises(TypeError, match="Sequential"):
        save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "out")
    assert left_behind(tmp_path) == []


def test_a_link_to_an_empty_folder_is_filled(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    rankwise.save(llama(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").is_file()
