"""A checkpoint compressed block by block equals one compressed in memory; a killed run equals a whole one."""

import gc
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from mixtures import MIXTURES
from safetensors.torch import load_file, save_file
from tiny import gpt2, llama, padded, plain
from torch import Generator, Tensor, nn

import rankwise
from rankwise import CalibrationError
from rankwise.compressors import KroneckerFactoredSvd, Mixed, PlainSvd, WhitenedSvd
from rankwise.core import labels, steps, tensor_file
from rankwise.core.steps import Steps
from rankwise.models.blocks import Chain, find_blocks
from rankwise.models.checkpoint import Checkpoint
from rankwise.streaming import _Run

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
BERT = {**SIZES, "num_attention_heads": 4, "max_position_embeddings": 64}
IMAGE = {"image_size": 16, "patch_size": 8, "num_channels": 3}
KEEP = 0.7


def images() -> list[Any]:
    pixels = torch.randn(12, 3, 16, 16, generator=Generator().manual_seed(1))
    return [{"pixel_values": part} for part in pixels.split(6)]


def decoder(name: str, *, config: str = "", **changes: Any) -> Callable[[], Any]:
    kind = getattr(transformers, config or f"{name}Config")
    return lambda: getattr(transformers, f"{name}ForCausalLM")(kind(**{**SIZES, **HEADS, **ENDS, **changes}))


def made(kind: str, config: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, kind)(config)


FAST = ("llama", "gpt2", "mixtral", "vit classifier")  # the other families are in the slow suite
FAMILIES = {
    "llama": (decoder("Llama"), padded),
    "llama with tied embeddings": (decoder("Llama", tie_word_embeddings=True), plain),
    "mistral with a sliding window": (decoder("Mistral", sliding_window=8), plain),
    "qwen2": (decoder("Qwen2"), padded),
    "qwen3": (decoder("Qwen3"), plain),
    "gemma2": (decoder("Gemma2", sliding_window=8), padded),
    "gemma3": (decoder("Gemma3", config="Gemma3TextConfig", sliding_window=8), plain),
    "phi3 with fused qkv": (decoder("Phi3"), plain),
    "gpt2": (gpt2, padded),
    "gpt neox": (decoder("GPTNeoX"), plain),
    "gpt-j": (
        made(
            "GPTJForCausalLM",
            transformers.GPTJConfig(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
        ),
        plain,
    ),
    "opt": (
        made("OPTForCausalLM", transformers.OPTConfig(**BERT, **ENDS, ffn_dim=48, word_embed_proj_dim=32)),
        padded,
    ),
    "falcon": (  # whose linear layers are a class of their own
        made(
            "FalconForCausalLM",
            transformers.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
        ),
        plain,
    ),
    "xlnet": (  # which gives parameters values on whatever device it is built
        made("XLNetModel", transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48)),
        plain,
    ),
    "mamba": (  # which takes the weight of a layer that it never calls
        made("MambaForCausalLM", transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)),
        plain,
    ),
    **{name: (make, plain) for name, make in MIXTURES.items()},
    "bert": (made("BertModel", transformers.BertConfig(**BERT)), padded),
    "bert classifier": (made("BertForSequenceClassification", transformers.BertConfig(**BERT)), padded),
    "vit": (made("ViTModel", transformers.ViTConfig(**BERT, **IMAGE)), images),
    "vit classifier": (made("ViTForImageClassification", transformers.ViTConfig(**BERT, **IMAGE)), images),
}


def source(make: Callable[[], Any], folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random model in many small shards."""
    torch.manual_seed(0)
    make().to(dtype).save_pretrained(folder, max_shard_size="20KB")
    return folder


def output(folder: Path, batch: Any) -> Tensor:
    model, _ = rankwise.load(folder)
    with torch.no_grad():
        found = model(**batch) if isinstance(batch, dict) else model(batch)
    return found["logits" if "logits" in found else "last_hidden_state"].float()


def same_as_in_memory(folder: Path, work: Path, method: Any, batches: list[Any], **options: Any) -> None:
    streamed = rankwise.compress_folder(folder, work / "streamed", method, keep=KEEP, data=batches, **options)
    model, _ = rankwise.load(folder)
    known = rankwise.compress(model, method, keep=KEEP, data=batches, **options)
    rankwise.save(model, work / "known")
    assert streamed.totals["keep"] == known.totals["keep"]
    for row, other in zip(streamed.rows, known.rows, strict=True):
        for key in row:
            close = pytest.approx(other[key], rel=1e-3, abs=1e-9) if key.endswith("error") else other[key]
            assert row[key] == close, (row["name"], key)
    torch.testing.assert_close(
        output(work / "streamed", batches[0]), output(work / "known", batches[0]), rtol=1e-4, atol=1e-4
    )
    assert not (work / "streamed.partial").exists()


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch):
    for module in (steps, tensor_file):
        monkeypatch.setattr(module, "sync", lambda path: None)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in FAMILIES]
)
def test_a_streamed_model_equals_one_compressed_in_memory(family, tmp_path):
    make, batches = FAMILIES[family]
    same_as_in_memory(source(make, tmp_path / "dense"), tmp_path, KroneckerFactoredSvd(), batches())


@pytest.mark.parametrize(
    "method",
    [PlainSvd(), WhitenedSvd(), pytest.param(Mixed(), marks=pytest.mark.slow)],
    ids=lambda method: type(method).__name__,
)
def test_any_method_can_be_streamed(method, tmp_path):
    same_as_in_memory(source(llama, tmp_path / "dense"), tmp_path, method, plain())


@pytest.mark.parametrize("method", [PlainSvd(), KroneckerFactoredSvd()], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("batches", [plain, pytest.param(padded, marks=pytest.mark.slow)])
def test_a_sequential_stream_equals_one_in_memory(method, batches, tmp_path):
    folder = source(llama, tmp_path / "dense")
    same_as_in_memory(folder, tmp_path, method, batches(), sequential=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [PlainSvd(), pytest.param(KroneckerFactoredSvd(), marks=pytest.mark.slow)],
    ids=lambda method: type(method).__name__,
)
def test_a_sequential_stream_of_experts_equals_one_in_memory(method, tmp_path):
    folder = source(MIXTURES["qwen2 moe"], tmp_path / "dense")
    same_as_in_memory(folder, tmp_path, method, plain(), sequential=True)


def test_bfloat16_stays_bfloat16(tmp_path):
    folder = source(llama, tmp_path / "dense", torch.bfloat16)
    rankwise.compress_folder(folder, tmp_path / "out", KroneckerFactoredSvd(), keep=KEEP, data=plain())
    model, _ = rankwise.load(tmp_path / "out")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16, torch.int32}


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return source(lambda: llama(initializer_range=0.3), tmp_path_factory.mktemp("dense") / "llama")


@pytest.fixture(scope="module")
def whole(dense, tmp_path_factory) -> Path:
    """What an uninterrupted run makes."""
    return run(dense, tmp_path_factory.mktemp("whole") / "out")


def run(folder: Path, out: Path, **changes: Any) -> Path:
    options = {"method": KroneckerFactoredSvd(), "keep": KEEP, "data": plain(), **changes}
    rankwise.compress_folder(folder, out, **options)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def interrupted(folder: Path, out: Path, monkeypatch: Any, after: int, **changes: Any) -> bool:
    """Run, and interrupt after a number of new steps; return whether there were so many."""
    left, write = [after], Steps._write

    def writes(self: Steps) -> None:
        write(self)
        left[0] -= bool(self.known)
        if left[0] == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Steps, "_write", writes)
        try:
            run(folder, out, **changes)
        except KeyboardInterrupt:
            return True
    return False


def test_a_streamed_folder_is_like_one_that_is_saved(dense, whole, tmp_path):
    model, _ = rankwise.load(dense)
    rankwise.save(model, tmp_path / "saved")
    modes = {file.stat().st_mode for folder in (whole, tmp_path / "saved") for file in folder.iterdir()}
    assert len(modes) == 1
    index = json.loads((whole / "model.safetensors.index.json").read_text())
    shards = [load_file(file) for file in whole.glob("*.safetensors")]
    assert index["metadata"]["total_size"] == sum(x.nbytes for tensors in shards for x in tensors.values())


def test_a_run_interrupted_after_every_step_makes_the_same_bits(dense, whole, tmp_path, monkeypatch):
    times = 0
    while interrupted(dense, tmp_path / "out", monkeypatch, 1):
        times += 1
        assert not (tmp_path / "out").exists()
    assert times == 3 + 1 + 2 + 2 + 3 + 1  # hidden states, the loss, gradients, choices, shards, the whole
    assert contents(tmp_path / "out") == contents(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("removed", [0, 1, 5])
def test_a_run_killed_after_its_last_step_is_over_when_it_is_started_again(
    removed, dense, whole, tmp_path, monkeypatch
):
    left, remove, rmtree = [removed], Steps.remove, shutil.rmtree

    def dies(path: Path, **options: Any) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        rmtree(path, **options)

    def removes(self: Steps) -> None:
        with monkeypatch.context() as inside:
            inside.setattr(shutil, "rmtree", dies)
            remove(self)

    with monkeypatch.context() as patched:
        patched.setattr(Steps, "remove", removes)
        with pytest.raises(KeyboardInterrupt):
            run(dense, tmp_path / "out")
    with pytest.raises(ValueError, match="exists already"):
        run(dense, tmp_path / "out", keep=0.5)
    known = rankwise.compress_folder(dense, tmp_path / "known", KroneckerFactoredSvd(), keep=KEEP, data=plain())
    report = rankwise.compress_folder(dense, tmp_path / "out", KroneckerFactoredSvd(), keep=KEEP, data=plain())
    assert report.rows == known.rows
    assert contents(tmp_path / "out") == contents(whole)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_experts_streamed_with_an_interrupt_after_every_step_have_the_same_bits(tmp_path, monkeypatch):
    def make() -> Any:
        model = MIXTURES["gpt-oss"]()
        model.model.layers[1].mlp.router.bias.data[3] = -1e4  # an expert that no token reaches
        return model

    folder = source(make, tmp_path / "dense")
    known = run(folder, tmp_path / "known")
    while interrupted(folder, tmp_path / "out", monkeypatch, 1):
        assert not (tmp_path / "out").exists()
    assert contents(tmp_path / "out") == contents(known)
    report = rankwise.compress_folder(folder, tmp_path / "again", KroneckerFactoredSvd(), keep=KEEP, data=plain())
    assert report.totals["unreached"] == [
        f"model.layers.1.mlp.experts.{name}.3" for name in ("gate_up_proj", "down_proj")
    ]


def test_a_run_killed_between_a_folder_and_its_entry_makes_the_same_bits(dense, whole, tmp_path, monkeypatch):
    def dies(self: Steps) -> None:
        if len(self.known) == 5:
            raise KeyboardInterrupt
        write(self)

    write = Steps._write
    with monkeypatch.context() as patched:
        patched.setattr(Steps, "_write", dies)
        with pytest.raises(KeyboardInterrupt):
            run(dense, tmp_path / "out")
    assert contents(run(dense, tmp_path / "out")) == contents(whole)


@pytest.mark.slow
def test_a_process_killed_at_any_time_makes_the_same_bits(dense, whole, tmp_path):
    code = f"""
import sys, time
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
from pathlib import Path
from rankwise.core import tensor_file
from test_stream import run
def told(file):
    print("saved", flush=True)
    time.sleep(0.05)
tensor_file.sync = told
run(Path({str(dense)!r}), Path({str(tmp_path / "out")!r}))
"""
    kills = 0
    while not (tmp_path / "out").exists():
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            if all(process.stdout.readline() for _ in range(kills + 1)):
                time.sleep(0.02 * kills)  # while the file waits for its name, and after
                process.kill()  # SIGKILL
                kills += 1
    assert kills >= 2
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data": plain()[:1]}, "data"),
        ({"seed": 1}, "seed"),
        ({"method": KroneckerFactoredSvd(output_damping=0.1)}, "method"),
        ({"labels": labels.given}, "labels"),
        ({"dtype": torch.bfloat16}, "dtype"),
        ({"where": lambda name, layer: "mlp" in name}, "layers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_about_something_else_is_refused(change, named, dense, tmp_path, monkeypatch):
    assert interrupted(dense, tmp_path / "out", monkeypatch, 1)
    with pytest.raises(ValueError, match=f"unfinished run with another {named}"):
        run(dense, tmp_path / "out", **change)


@pytest.mark.slow
def test_labels_without_a_name_are_told_by_what_they_compute(dense, tmp_path, monkeypatch):
    one, same = (lambda *arguments: labels.given(*arguments) for _ in range(2))
    assert interrupted(dense, tmp_path / "out", monkeypatch, 1, labels=one)
    with pytest.raises(ValueError, match="unfinished run with another labels"):
        run(dense, tmp_path / "out", labels=lambda *arguments: labels.gaussian(*arguments))
    run(dense, tmp_path / "out", labels=same)


def test_another_checkpoint_is_refused(dense, tmp_path, monkeypatch):
    assert interrupted(dense, tmp_path / "out", monkeypatch, 1)
    other = source(lambda: llama(num_hidden_layers=3), tmp_path / "other")
    with pytest.raises(ValueError, match=r"another (checkpoint|layers)"):
        run(other, tmp_path / "out")


@pytest.mark.slow
def test_the_budget_may_change_on_the_way(dense, tmp_path, monkeypatch):
    assert interrupted(dense, tmp_path / "out", monkeypatch, 9)  # one shard is written
    changes = {"keep": 0.5, "of": "bytes", "allocate": rankwise.allocators.uniform}
    run(dense, tmp_path / "out", **changes)
    assert contents(tmp_path / "out") == contents(run(dense, tmp_path / "whole", **changes))


@pytest.mark.slow
def test_a_sequential_run_that_is_interrupted_makes_the_same_bits(dense, tmp_path, monkeypatch):
    changes = {"sequential": 0.5}
    assert interrupted(dense, tmp_path / "out", monkeypatch, 10)  # two shards are written, not sequentially
    while interrupted(dense, tmp_path / "out", monkeypatch, 1, **changes):
        pass
    whole = run(dense, tmp_path / "whole", **changes)
    assert contents(tmp_path / "out") == contents(whole)


def test_a_budget_that_cannot_be_met_keeps_the_work(dense, whole, tmp_path):
    with pytest.raises(ValueError, match="cannot be met"):
        run(dense, tmp_path / "out", keep=0.001)
    assert not (tmp_path / "out").exists()
    assert contents(run(dense, tmp_path / "out")) == contents(whole)


def test_a_damaged_step_is_named_and_a_missing_one_is_made_again(dense, whole, tmp_path, monkeypatch):
    assert interrupted(dense, tmp_path / "out", monkeypatch, 4)
    damaged = tmp_path / "out.partial" / "hidden-1" / "0.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=f"{damaged} is damaged; remove the folder"):
        run(dense, tmp_path / "out")
    damaged.unlink()
    assert contents(run(dense, tmp_path / "out")) == contents(whole)


def test_a_damaged_shard_is_not_taken(dense, tmp_path, monkeypatch):
    assert interrupted(dense, tmp_path / "out", monkeypatch, 10)
    damaged = tmp_path / "out.partial" / "shard-1" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=f"{damaged} is damaged"):
        run(dense, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_manifest_is_named(dense, tmp_path, monkeypatch):
    assert interrupted(dense, tmp_path / "out", monkeypatch, 1)
    (tmp_path / "out.partial" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        run(dense, tmp_path / "out")


def test_a_step_that_is_made_again_differently_may_be_killed_at_any_time(tmp_path, monkeypatch):
    """Files as long as before, under the hash of those before, would count as damaged."""
    work, original = Steps(tmp_path / "work", {}), Path.rename

    def killed(self: Path, target: Path) -> Path:
        original(self, target)
        raise KeyboardInterrupt

    def make(word: str) -> Callable[[Path], dict[str, Any]]:
        return lambda folder: {"length": (folder / "word").write_text(word)}

    work.run("one", make("this"), {"about": "this"})
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            work.run("one", make("that"), {"about": "that"})
    work.close()
    again = Steps(tmp_path / "work", {})
    again.run("one", make("this"), {"about": "this"})
    assert again.file("one", "word").read_text() == "this"
    again.close()


def test_two_runs_at_once_are_refused(dense, tmp_path):
    held = Steps(tmp_path / "out.partial", {})
    with pytest.raises(ValueError, match="another run is at work"):
        run(dense, tmp_path / "out")
    held.close()


@pytest.mark.parametrize("writes", [1, 8, 19, 22])
def test_a_full_disk_keeps_the_work(writes, dense, whole, tmp_path, monkeypatch):
    left = [writes]

    def fills(file: Path) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(28, "No space left on device", str(file))

    with monkeypatch.context() as patched:
        patched.setattr(tensor_file, "sync", fills)
        with pytest.raises(OSError, match=r"step .* failed: .*No space left .* kept in .*out\.partial"):
            run(dense, tmp_path / "out")
    left_over = [path.name for path in (tmp_path / "out.partial").iterdir() if path.name.endswith(".tmp")]
    assert left_over == []
    assert not (tmp_path / "out").exists()
    assert contents(run(dense, tmp_path / "out")) == contents(whole)


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [64, 256])
def test_a_disk_that_is_really_full_keeps_the_work(kilobytes, dense, whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        with pytest.raises(OSError, match=r"step .* failed: .*kept in .*out\.partial"):
            run(dense, disk / "out")
        assert not (disk / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert contents(run(dense, disk / "out")) == contents(whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def damaged_copy(dense: Path, folder: Path, damage: Callable[[Path], None]) -> Path:
    """Copy a checkpoint and damage the shard with a layer of the second block."""
    shutil.copytree(dense, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    damage(folder / index["weight_map"][LAYER])
    return folder


LAYER = "model.layers.1.mlp.down_proj.weight"


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip_header(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[10] ^= 0xFF
    file.write_bytes(content)


def rewrite(change: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        tensors = {name: change(x) if name == LAYER else x for name, x in load_file(file).items()}
        save_file({name: x for name, x in tensors.items() if x is not None}, file, {"format": "pt"})

    return damage


DAMAGES = {
    "cut short": (cut_short, r"safetensors is damaged or cut short"),
    "header": (flip_header, r"safetensors is damaged or cut short"),
    "missing file": (Path.unlink, r"safetensors is missing"),
    "nan": (rewrite(lambda x: x * torch.nan), f"{LAYER} in .*safetensors holds NaN"),
    "missing tensor": (rewrite(lambda x: None), rf"{LAYER} is not in"),
    "shape": (rewrite(lambda x: x[:-1].clone()), rf"{LAYER} is \(31, 48\) in the checkpoint"),
    "overflow": (
        rewrite(lambda x: x.sign() * 3e38),
        r"block model\.layers\.1 makes hidden .* not finite",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named(damage, dense, tmp_path):
    spoil, message = DAMAGES[damage]
    folder = damaged_copy(dense, tmp_path / "dense", spoil)
    with pytest.raises(ValueError, match=message) as caught:
        run(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: "{", "damaged"),
        (lambda config: config | {"model_type": "none such"}, "none such"),
        (lambda config: config | {"model_type": "none such", "auto_map": {"AutoConfig": "x.Y"}}, "none such"),
        (lambda config: config | {"num_attention_heads": 5}, "multiple of the number of attention heads"),
    ],
)
def test_a_damaged_config_is_named(change, message, dense, tmp_path, monkeypatch):
    def asked(*words: Any) -> str:
        raise AssertionError("nobody is there to be asked whether code may run")

    monkeypatch.setattr("builtins.input", asked)
    file = Path(shutil.copytree(dense, tmp_path / "dense")) / "config.json"
    changed = change(json.loads(file.read_text()))
    file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(ValueError, match=rf"config\.json.*{message}") as caught:
        run(tmp_path / "dense", tmp_path / "out")
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)


def test_a_tensor_that_nobody_reads_is_named(dense, whole, tmp_path):
    def add(file: Path) -> None:
        save_file({**load_file(file), "model.layers.1.strange.weight": torch.ones(2)}, file, {"format": "pt"})

    folder = damaged_copy(dense, tmp_path / "dense", add)
    with pytest.warns(UserWarning, match=r"1 tensors of .* are not used: model\.layers\.1\.strange\.weight"):
        run(folder, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)


def test_arguments_are_checked_before_anything_is_written(dense, whole, tmp_path):
    cases = [
        ({"data": None}, "needs calibration data"),
        ({"keep": 1.5}, "keep"),
        ({"where": lambda name, layer: False}, "no layer"),
        ({"seed": 2**70}, "seed must be a whole number of at most 18 digits"),
        ({"data": torch.arange(40), "window": 0}, "window must be >= 2"),
        ({"data": torch.arange(40), "window": 1}, "window must be >= 2"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            run(dense, tmp_path / "out", **change)
    with pytest.raises(ValueError, match="exists already"):
        run(dense, whole)
    with pytest.raises(ValueError, match="compressed by rankwise already"):
        run(whole, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "letter.txt").touch()
    with pytest.raises(ValueError, match="no unfinished run"):
        run(dense, tmp_path / "out")


def test_one_block_at_a_time_has_values(dense):
    checkpoint = Checkpoint(dense)
    blocks = find_blocks(checkpoint.model)
    checkpoint.fill_all_but(blocks)

    def filled() -> set[str]:
        names = [name for name, p in checkpoint.model.named_parameters() if not p.is_meta]
        return {name.removeprefix(f"{blocks}.")[0] for name in names}

    assert filled() == {"m"}  # model.embed_tokens, model.norm
    for i in range(2):
        with checkpoint.filled(f"{blocks}.{i}"):
            assert filled() == {"m", str(i)}
    assert filled() == {"m"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [lambda: llama(intermediate_size=56), MIXTURES["qwen2 moe"]], ids=["mlp", "experts"]
)
@pytest.mark.parametrize("sequential", [False, True])
def test_no_weight_of_a_finished_block_stays_in_memory(make, sequential, tmp_path, monkeypatch):
    folder = source(make, tmp_path / "dense")
    shapes = {p.shape for name, p in make().named_parameters() if ".layers." in name and p.dim() > 1}
    shapes |= {shape[1:] for shape in shapes if len(shape) == 3}
    left, write = [], _Run._write

    def alive() -> list[Tensor]:
        gc.collect()
        tensors = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]
        return [each for each in tensors if not each.is_meta and each.shape in shapes]

    def writes(self: _Run, part: str, picks: Any) -> Any:
        found = write(self, part, picks)
        left.append([tuple(each.shape) for each in alive()])
        return found

    monkeypatch.setattr(_Run, "_write", writes)
    options: Any = {"keep": 0.5, "data": plain(), "sequential": sequential}
    gc.freeze()  # what other tests left is not looked at
    try:
        rankwise.compress_folder(folder, tmp_path / "out", WhitenedSvd(), **options)
    finally:
        gc.unfreeze()
    assert left == [[]] * 3


class Toy(nn.Module):
    """A model of three blocks; subclasses do what cannot be streamed."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Between(Toy):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) + 1
        return x


class Twice(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class Unused(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](x))


class Around(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Block(nn.Linear):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Any:
        y = super().forward(x)
        return y, y.sum()


class Passing(Toy):
    """Blocks hand each other a second tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(4, 4) for _ in range(3)).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        scale = None
        for block in self.blocks:
            x, scale = block(x, scale)
        return x


class Looking(Passing):
    """Blocks take something made of the hidden state."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, x.mean())[0]
        return x


REFUSED = {
    Between: "each take what",
    Twice: "once and in order",
    Unused: "only 2 of the 3",
    Passing: "pass on",
    Looking: "pass on",
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_a_model_that_is_no_chain_is_refused(kind):
    model = kind()
    with pytest.raises(ValueError, match=REFUSED[kind]):
        Chain(model, find_blocks(model)).learn(torch.randn(2, 4))


def test_a_detour_around_the_blocks_is_refused():
    model, x = Around(), torch.randn(2, 4)
    chain = Chain(model, find_blocks(model))
    chain.learn(x)
    output = chain.leave(x, torch.randn(2, 4, requires_grad=True))
    with pytest.raises(ValueError, match="goes around"):
        output.sum().backward()


def test_parts_of_a_chain_make_the_whole():
    model, x = Toy(), torch.randn(2, 4)
    chain = Chain(model, find_blocks(model))
    chain.learn(x)
    y = chain.enter(x)
    for i in range(3):
        y = chain.block(i, x, y)
    assert torch.equal(chain.leave(x, y), model(x))
    assert all("forward" not in vars(block) for block in model.blocks)


@pytest.mark.parametrize("kind", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_encoder_decoders_are_refused(kind, tmp_path):
    sizes = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0)
    if kind.startswith("Bart"):
        each = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
        both = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in each.items()}
        config = transformers.BartConfig(vocab_size=64, d_model=32, max_position_embeddings=64, **both)
    folder = source(made(kind, config), tmp_path / "dense")
    batches = [{"input_ids": part, "decoder_input_ids": part} for part in plain()]
    with pytest.raises(ValueError, match="cannot be taken block by block"):
        run(folder, tmp_path / "out", data=batches)


def test_a_run_refused_at_once_leaves_nothing(dense, tmp_path, monkeypatch):
    def refuse(*_: Any) -> None:
        raise ValueError("no chain")

    monkeypatch.setattr(Chain, "learn", refuse)
    with pytest.raises(ValueError, match="no chain"):
        run(dense, tmp_path / "out")
    assert not [*tmp_path.iterdir()]


class Both(transformers.LlamaForCausalLM):
    """Runs its head on the embeddings as well, for no effect."""

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        embedded = self.model.embed_tokens(input_ids)
        return super().forward(inputs_embeds=embedded + 0 * self.lm_head(embedded).sum(), **options)


class Never(transformers.LlamaForCausalLM):
    """Has a layer that nothing runs."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.idle = nn.Linear(4, 4)


@pytest.mark.parametrize(("kind", "places"), [(Both, "both before and after"), (Never, "never")])
def test_a_layer_outside_the_blocks_is_reached_in_one_place(kind, places, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], kind.__name__, kind, raising=False)
    folder = source(lambda: kind(llama(tie_word_embeddings=False).config), tmp_path / "dense")
    batches = [{"input_ids": part} for part in plain()]
    with pytest.raises(CalibrationError, match=f"reached {places}"):
        run(folder, tmp_path / "out", data=batches, where=lambda name, layer: True)


def test_a_weight_shared_by_blocks_is_refused(dense, tmp_path, monkeypatch):
    build = transformers.LlamaForCausalLM.__init__

    def shares(self: Any, *arguments: Any, **options: Any) -> None:
        build(self, *arguments, **options)
        first, second = (block.mlp.up_proj for block in self.model.layers)
        second.weight = first.weight

    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", shares)
    with pytest.raises(ValueError, match="share a weight"):
        run(dense, tmp_path / "out")


def nothing(output: Any, batch: Any, generator: Generator) -> Tensor:
    return (output["logits"] * 0).sum() * torch.nan


def test_data_that_does_not_reach_a_loss_is_named(dense, tmp_path):
    with pytest.raises(CalibrationError, match="not finite"):
        run(dense, tmp_path / "out", labels=nothing)


@pytest.mark.parametrize("sequential", [False, True])
def test_labels_behind_the_arguments_are_those_that_are_named(sequential: bool, tmp_path: Path):
    """And do not go into the model, in memory and out of it."""
    folder, options = source(llama, tmp_path / "dense"), {"keep": KEEP, "labels": labels.given}
    ids = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(3))
    wanted = ids.clone()
    wanted[:, :6] = -100
    outputs = []
    for i, batch in enumerate([{"input_ids": ids, "labels": wanted}, (ids, wanted)]):
        method, out = KroneckerFactoredSvd(), tmp_path / f"streamed-{i}"
        rankwise.compress_folder(folder, out, method, data=[batch], sequential=sequential, **options)
        model, _ = rankwise.load(folder)
        rankwise.compress(model, method, data=[batch], sequential=sequential, **options)
        outputs += [output(out, ids), output(rankwise.save(model, tmp_path / f"memory-{i}"), ids)]
    for found in outputs[1:]:
        torch.testing.assert_close(found, outputs[0], rtol=1e-4, atol=1e-4)
