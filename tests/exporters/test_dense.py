"""A dense export is an ordinary folder, and computes what the compressed model computes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import MIXTURES
from safetensors.torch import load_file, save_file
from structures import IDS, STRUCTURES, bert, filled, gpt2, left_behind, low_rank, output, pivoted
from tiny import llama
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, BertModel, ViTConfig, ViTModel

import rankwise
from rankwise.adapters import Lora
from rankwise.compressors import PlainSvd
from rankwise.exporters import Dense, Merged


@pytest.mark.slow
def test_a_dense_export_loads_without_rankwise(tmp_path):
    model = filled(llama(), *STRUCTURES)
    rankwise.save(model, tmp_path / "small")
    out = rankwise.export(tmp_path / "small", Dense(), tmp_path / "out")
    save_file({"logits": output(model, IDS)}, tmp_path / "expected.safetensors")
    code = f"""
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(out)!r}).eval()
assert "rankwise" not in sys.modules
with torch.no_grad():
    logits = model(torch.arange(12).view(2, 6)).logits
print(float((logits - load_file({str(tmp_path / "expected.safetensors")!r})["logits"]).abs().max()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 1e-5
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert left_behind(tmp_path) == ["expected.safetensors", "out", "small"]


@pytest.mark.parametrize("make", [llama, lambda: llama(tie_word_embeddings=False), gpt2, bert])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_exports_compute_the_same(make, dtype, tmp_path):
    model = filled(make().to(dtype), low_rank, pivoted)
    out = rankwise.export(model, Dense(), tmp_path / "out")
    kind = AutoModel if isinstance(model, BertModel) else AutoModelForCausalLM
    other = kind.from_pretrained(out, dtype="auto").eval()
    assert {t.dtype for t in other.state_dict().values()} == {dtype}
    size = float(output(model, IDS).abs().max())
    error = (output(other, IDS) - output(model, IDS)).abs().max() / size
    assert error <= (1e-5 if dtype == torch.float32 else 0.05)  # bfloat16 has 8 bits, and rounds in other places


def test_shared_and_convolution_weights_fold(tmp_path):
    model = llama()
    first, second = (model.get_submodule(f"model.layers.{i}.self_attn.q_proj") for i in (0, 1))
    second.weight = first.weight
    out = rankwise.export(filled(model, low_rank), Dense(), tmp_path / "llama")
    torch.testing.assert_close(output(AutoModelForCausalLM.from_pretrained(out), IDS), output(model, IDS))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vit = ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8)).eval()
    out = rankwise.export(filled(vit, low_rank), Dense(), tmp_path / "vit")
    image = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(output(AutoModel.from_pretrained(out), image), output(vit, image))


def test_shards_stay_below_their_size_and_files_come_along(tmp_path):
    model = filled(llama(hidden_size=256, intermediate_size=512), low_rank)
    rankwise.save(model, tmp_path / "small")
    (tmp_path / "small" / "tokenizer.json").write_text("{}")
    (tmp_path / "small" / "report.html").write_text("of the compression")
    out = rankwise.export(tmp_path / "small", Dense(shard=1), tmp_path / "out")
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 1_100_000 for file in files)
    assert {"tokenizer.json", "generation_config.json", "model.safetensors.index.json"} <= set(left_behind(out))
    assert "report.html" not in left_behind(out)
    loaded = output(AutoModelForCausalLM.from_pretrained(out).double(), IDS)  # so that only files are rounded
    torch.testing.assert_close(loaded, output(model.double(), IDS), rtol=1.3e-6, atol=1e-5)


def test_what_cannot_be_exported_is_named(tmp_path):
    rankwise.save(llama(), tmp_path / "dense")
    with pytest.raises(ValueError, match="dense already"):
        rankwise.export(tmp_path / "dense", Dense(), tmp_path / "out")
    with pytest.raises(ValueError, match=r"nowhere.*does not exist"):
        rankwise.export(tmp_path / "nowhere", Dense(), tmp_path / "out")
    with pytest.raises(ValueError, match="dense exists already"):
        rankwise.export(filled(llama(), low_rank), Dense(), tmp_path / "dense")
    with pytest.raises(ValueError, match=r"does not exist; make it first"):
        rankwise.export(filled(llama(), low_rank), Dense(), tmp_path / "no" / "out")
    with pytest.raises(TypeError, match="rankwise"):
        rankwise.export(llama(), "dense", tmp_path / "out")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="shard must be"):
        Dense(shard=0)
    assert left_behind(tmp_path) == ["dense"]


@pytest.mark.parametrize("damage", ["missing", "shape", "kind", "cut"])
def test_a_damaged_folder_is_refused(damage, tmp_path):
    rankwise.save(filled(llama(), pivoted), tmp_path / "small")
    file = tmp_path / "small" / "model.safetensors"
    tensors, name = load_file(file), "model.layers.1.mlp.up_proj.matrix.mix"
    if damage == "missing":
        del tensors[name]
    elif damage == "shape":
        tensors[name] = torch.zeros(3, 3)
    else:
        tensors[name] = tensors[name].int()
    save_file(tensors, file, metadata={"format": "pt"})
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged" if damage == "cut" else name):
        rankwise.export(tmp_path / "small", Dense(), tmp_path / "out")
    assert left_behind(tmp_path) == ["small"]


def changed(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("model.norm.weight"), r"model\.norm\.weight is not in the checkpoint, as 1 of"),
        (lambda x: x.pop("lm_head.weight"), r"lm_head\.weight is not in the checkpoint, as 1 of"),
        (
            lambda x: x.update({"model.norm.weight": torch.ones(3)}),
            r"norm\.weight is \(3,\) in .*, but \(32,\) in",
        ),
    ],
)
def test_a_folder_that_lacks_tensors_is_refused(change, message, tmp_path):
    rankwise.save(filled(llama(tie_word_embeddings=False), low_rank), tmp_path / "small")
    with pytest.raises(ValueError, match=message):
        rankwise.export(changed(tmp_path / "small", change), Dense(), tmp_path / "out")


def test_a_mixture_that_lacks_an_expert_is_refused(tmp_path):
    model = MIXTURES["mixtral"]()
    model.save_pretrained(tmp_path / "dense")
    rankwise.compress(model, PlainSvd(), keep=0.6, where=lambda name, _: "self_attn" in name)
    small = rankwise.save(model, tmp_path / "small")
    whole = rankwise.export(small, Dense(), tmp_path / "whole")
    written, own = (load_file(folder / "model.safetensors") for folder in (whole, tmp_path / "dense"))
    assert written.keys() == own.keys()
    changed(small, lambda x: x.pop("model.layers.1.block_sparse_moe.experts.2.w1.weight"))
    with pytest.raises(ValueError, match=r"only 5 of 6 tensors of model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        rankwise.export(small, Dense(), tmp_path / "out")


def test_what_the_model_does_not_know_is_named_and_left_out(tmp_path):
    small = rankwise.save(filled(llama(), low_rank), tmp_path / "small")
    changed(small, lambda x: x.update({"stray": torch.ones(2), "model.rotary_emb.inv_freq": torch.ones(4)}))
    with pytest.warns(UserWarning, match=r"1 tensors of .*small are not used: stray\."):
        out = rankwise.export(small, Dense(), tmp_path / "out")
    assert load_file(out / "model.safetensors").keys() == llama().state_dict().keys() - {"lm_head.weight"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: "{bad", "damaged"),
        (lambda config: [], "must hold one JSON object"),
        (lambda config: config | {"quantization_config": "x"}, "quantization_config must hold fields, got 'x'"),
        (lambda config: config | {"model_type": 3}, "model_type must be the name of a kind of model, got 3"),
        (lambda config: {"hidden_size": 3}, "model_type must be the name of a kind of model, got None"),
        (lambda config: config | {"model_type": "none such"}, "none such"),
        (lambda config: config | {"hidden_size": "x"}, "hidden_size"),
        (
            lambda config: config | {"quantization_config": {"quant_method": "rankwise", "version": 1}},
            "matrices must be a list of names and specs, got 'None'",
        ),
        (lambda config: config | {"num_hidden_layers": 1}, r"layers\.1\.self_attn\.q_proj is in the config"),
    ],
)
@pytest.mark.parametrize("export", [Dense(), Merged(base="small")])
def test_a_damaged_config_is_named(change, message, export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = rankwise.save(filled(llama(), low_rank), Path("small")) / "config.json"
    changed = change(json.loads(file.read_text()))
    file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    source = Path("small")
    if isinstance(export, Merged):
        source = llama()
        rankwise.adapt(source, Lora(rank=2))
    with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
        rankwise.export(source, export, "out")


def test_numbers_that_are_none_are_named(tmp_path):
    small, name = rankwise.save(filled(llama(), low_rank), tmp_path / "small"), "model.layers.1.mlp.up_proj"
    sound = load_file(small / "model.safetensors")
    for key, value in ((f"{name}.matrix.left", torch.nan), ("model.norm.weight", -torch.inf)):
        tensors = {other: tensor.clone() for other, tensor in sound.items()}
        tensors[key].view(-1)[0] = value
        save_file(tensors, small / "model.safetensors", metadata={"format": "pt"})
        layer = key.partition(".matrix.")[0].removesuffix(".weight")
        with pytest.raises(ValueError, match=rf"{layer}\.weight holds NaN or infinity as torch\.float32"):
            rankwise.export(small, Dense(), tmp_path / "out")
    assert left_behind(tmp_path) == ["small"]


def test_a_lost_file_of_several_is_named(tmp_path):
    model = filled(llama(tie_word_embeddings=False), low_rank)
    small = rankwise.save(model, tmp_path / "small")
    tensors, names = load_file(small / "model.safetensors"), ("a.safetensors", "b.safetensors")
    parts = {"lm_head.weight": tensors.pop("lm_head.weight")}, tensors
    places = {name: file for file, part in zip(names, parts, strict=True) for name in part}
    index = small / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (small / "model.safetensors").unlink()
    for file, part in zip(names, parts, strict=True):
        save_file(part, small / file, metadata={"format": "pt"})
    save_file({"stray": torch.ones(2)}, small / "consolidated.safetensors", metadata={"format": "pt"})
    out = rankwise.export(small, Dense(), tmp_path / "out")
    assert load_file(out / "model.safetensors").keys() == llama(tie_word_embeddings=False).state_dict().keys()
    for damage, message in (
        (lambda: save_file({"other": torch.ones(2)}, small / names[0]), r"lm_head\.weight is not in .*a\.saf"),
        (lambda: (small / names[0]).unlink(), r"a\.safetensors is missing"),
        (lambda: index.write_text('{"weight_map": {"x": 3}}'), r"index\.json is damaged: its weight_map"),
        (lambda: index.write_text("{"), r"index\.json is damaged"),
        (index.unlink, "has neither"),
    ):
        damage()
        with pytest.raises(ValueError, match=message):
            rankwise.export(small, Dense(), tmp_path / "none")


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_behind(tmp_path):
    """In a process of its own whose files may not grow beyond a limit, as on a disk that is full."""
    rankwise.save(filled(llama(hidden_size=128), low_rank), tmp_path / "small")
    words = ["export", str(tmp_path / "small"), "--to", "dense", "--out", str(tmp_path / "out")]
    code = f"""
import resource, signal, sys
import rankwise
from rankwise.cli import app
from typer.testing import CliRunner
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
result = CliRunner().invoke(app, {words!r})
print(result.exit_code, result.stderr.strip().splitlines()[-1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("2 error: ")
    assert "File too large" in done.stdout
    assert left_behind(tmp_path) == ["small"]
