"""``rankwise train`` on tiny models: new ones and old, files, resume, and one-line errors."""

import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_cli import folder as folder
from test_cli import refused, run
from test_cli import text as text

import rankwise
from rankwise import adapters, compressors, initialisers, optimizers, preconditioners, projectors, rank_rules
from rankwise.cli.options import build, command_name, pick, registry
from rankwise.core import checkpoint, running
from rankwise.core.checkpoint import load_tree
from rankwise.core.supervision import CHECKPOINT
from rankwise.models import byte_tokenizer, fresh, read_config, trained_tokenizer

WORDS = "llama:hidden=32,layers=2,heads=4,intermediate=48"


def train(model: Any, *more: object):
    sizes = ["--window", 32, "--batch", 2, "--steps", 4, "--lr", 0.02]
    return run("train", model, *sizes, *more)


def same(one: Path, two: Path) -> bool:
    first, second = (rankwise.load(path)[0].state_dict() for path in (one, two))
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_new_model_of_bytes(text: Path, tmp_path: Path):
    out, figures, page = tmp_path / "out", tmp_path / "figures.json", tmp_path / "page.html"
    words = ["--rank", 4, "--set", "projector=svd", "--set", "every=3", "--steps", 20, "--clip", 0.7]
    result = train(WORDS, "--data", text, *words, "--out", out, "--json", figures, "--html", page)
    assert result.exit_code == 0, result.output
    found = json.loads(figures.read_text())
    assert found["held_out"]["after"] < 0.9 * found["held_out"]["before"]
    assert found["steps"] == 20
    assert "numbers in matrices get galore" in result.stderr
    assert "predicted   weights" in result.stderr
    assert "measured    rise" in result.stderr
    assert "held-out loss" in result.stdout
    assert page.exists()
    assert not (tmp_path / "out.partial").exists()
    model, tokenizer = rankwise.load(out)
    assert model.config.vocab_size == len(tokenizer) == 257
    assert tokenizer.decode(tokenizer("né\n")["input_ids"]) == "né\n"
    again = train(out, "--data", text, "--optimizer", "muon", "--other-lr", 0.001, "--json", figures)
    assert again.exit_code == 0, again.output
    on = json.loads(figures.read_text())["held_out"]["before"]
    assert on < 0.95 * found["held_out"]["before"]  # it goes on from what was saved


def test_a_run_goes_on_with_its_own_clip(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is usual depends on the number of processes, which may be another one now."""
    words = [WORDS, "--data", text, "--rank", 4, "--every", 1, "--out", tmp_path / "out"]
    step, calls, clips = running.Run._step, itertools.count(1), []

    def killed(self: running.Run) -> Any:
        clips.append(self.plan.clip)
        if next(calls) == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(running.Run, "_step", killed)
    assert train(*words, "--clip", 0.25).exit_code == 130
    result = train(*words, "--resume")
    assert result.exit_code == 0, result.output
    assert set(clips) == {0.25}


def test_a_loaded_model_and_json_lines(folder: Path, text: Path, tmp_path: Path):
    lines, figures = tmp_path / "texts.jsonl", tmp_path / "figures.json"
    lines.write_text('{"text": "ban das"}\n{"text": "dat"}\n', encoding="utf-8")
    words = ["--data", text, "--data", lines, "--eval", lines, "--json", figures, "--steps", 32]
    result = train(folder, *words, "--rank", 4)
    assert result.exit_code == 0, result.output
    tokens = (2000 + 1) + (2 + 1) + (1 + 1)  # and the ends; one pass over windows of 32, the last one shorter
    assert json.loads(figures.read_text())["rows"] == tokens - 63
    for words in (["--layerwise", "--dtype", "bfloat16"], ["--autocast", "--gradient-checkpointing"]):
        result = train(folder, "--data", text, "--rank", 4, *words)
        assert result.exit_code == 0, result.output


def test_what_is_no_hidden_matrix_gets_what_is_named(text: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    real = rankwise.pretraining.parameter_groups
    monkeypatch.setattr(
        rankwise.pretraining,
        "parameter_groups",
        lambda *given, **named: seen.append(named["other"]) or real(*given, **named),
    )
    result = train(WORDS, "--data", text, "--optimizer", "muon", "--set", "other=sign", "--steps", 1)
    assert result.exit_code == 0, result.output
    assert "others sign" in result.stderr
    assert train(WORDS, "--data", text, "--optimizer", "muon", "--steps", 1).exit_code == 0
    trion = train(WORDS, "--data", text, "--optimizer", "trion", "--rank", 4, "--set", "other=sign", "--steps", 1)
    assert trion.exit_code == 0, trion.output
    assert seen == [rankwise.optimizers.sign(), rankwise.optimizers.adam(), rankwise.optimizers.sign()]


def test_a_killed_run_goes_on(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a tokenizer that was trained, too."""
    words = [f"{WORDS},vocab=280", "--data", text, "--rank", 4, "--every", 1, "--layerwise"]
    whole = train(*words, "--out", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    step, calls = running.Run._step, itertools.count(1)

    def killed(self: running.Run) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(running.Run, "_step", killed)
    out = tmp_path / "out"
    result = train(*words, "--out", out)
    assert result.exit_code == 130
    assert "--resume goes on from it" in result.stderr
    assert not out.exists()
    monkeypatch.setattr(running.Run, "_step", step)
    refused(train(*words, "--out", out), "out.partial", "--resume")
    refused(train(*words, "--out", out, "--lr", 0.1, "--resume"), "another model")
    result = train(*words, "--out", out, "--resume")
    assert result.exit_code == 0, result.output
    assert "training a tokenizer" not in result.stderr
    assert same(tmp_path / "whole", out)
    assert len(rankwise.load(out)[1]) == 280


@pytest.mark.slow
def test_a_process_that_is_killed_goes_on(text: Path, tmp_path: Path):
    """By a signal that nothing can catch, at a moment that nothing chose."""
    words = ["train", WORDS, "--data", text, "--rank", 4, "--every", 1, "--steps", 300, "--window", 32]
    start = [sys.executable, "-c", "from rankwise.cli import main; main()", *map(str, words)]
    whole, out = tmp_path / "whole", tmp_path / "out"
    subprocess.run([*start, "--out", str(whole)], check=True, capture_output=True)
    file = tmp_path / "out.partial" / CHECKPOINT
    with subprocess.Popen([*start, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not file.exists() or load_tree(file)["progress"]["step"] < 20:
            time.sleep(0.05)
        process.kill()
    assert not out.exists()
    assert 20 <= load_tree(file)["progress"]["step"] < 300
    subprocess.run([*start, "--out", str(out), "--resume"], check=True, capture_output=True)
    assert same(whole, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_config_is_a_model_without_numbers(text: Path, folder: Path, tmp_path: Path):
    config = tmp_path / "config.json"
    config.write_text((folder / "config.json").read_text())
    refused(train(config, "--data", text, "--rank", 4), "the tokenizer has 257 tokens", "vocabulary of 103")
    result = train(config, "--data", text, "--rank", 4, "--tokenizer", folder)
    assert result.exit_code == 0, result.output


def test_figures_go_to_tensorboard(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            seen.append(folder)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            seen.append("closed")

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, step))

    module = ModuleType("torch.utils.tensorboard")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    words = ["--data", text, "--rank", 4, "--tensorboard", tmp_path / "logs"]
    refused(train(WORDS, *words), "pip install tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    result = train(WORDS, *words)
    assert result.exit_code == 0, result.output
    assert seen[0] == str(tmp_path / "logs")
    assert seen[-1] == "closed"
    assert {("train", 4), ("lr", 1), ("held_out", 0), ("held_out", 4)} <= set(seen)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--optimizer", "galor"], ["did you mean galore?"]),
        (["--optimizer", "project"], ["--set projector=... is needed"]),
        (["--optimizer", "galore", "--set", "projector=svdd"], ["got 'svdd'; did you mean svd?"]),
        (["--seed", 10**24], ["--seed must be a whole number of at most 18 digits"]),
        (["--rank", 4, "--set", "inner=galore"], ["--set inner: must be one of", "adafactor"]),
        (["--rank", 4, "--set", "projector=keep"], ["--set projector: must be one of", "warm-power"]),
        (["--optimizer", "adam", "--set", "betas=0.9"], ["--set betas: must be float,float"]),
        (["--optimizer", "adam", "--rank", 4], ["--rank: adam has no rank"]),
        (["--optimizer", "soap", "--set", "every=backoff"], ["--set every: must be int, got 'backoff'"]),
        (["--rank", 4, "--lr", 0], ["--lr must be a positive number"]),
        (["--rank", 4, "--warmup", 1], ["warmup must be >= 0 and < 1"]),
        (["--rank", 4, "--layerwise", "--clip", 1, "--accumulate", 2], ["cannot be clipped; leave clip out"]),
        (["--rank", 4, "--window", 1], ["--window must be at least 2"]),
        (["--rank", 4, "--window", 4096], ["window 4096 is longer than the 2048 positions"]),
        (["--rank", 4, "--device", "tpu"], ["--device: unknown 'tpu'"]),
        (["--rank", 4, "--resume"], ["--resume needs --out"]),
        (["--rank", 4, "--tokenizer", "pairs"], ["needs more than 257 tokens"]),
    ],
)
def test_wrong_words_are_named(text: Path, words: list[object], expected: list[str]):
    refused(train(WORDS, "--data", text, *words), *expected)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("alpaca:hidden=32", "'alpaca' is no family"),
        ("llama:hiddens=32", "did you mean hidden"),
        ("llama:hidden", "family:field=value"),
        ("llama:hidden=33,heads=4", "33"),
        ("nothing.json", "nothing.json does not exist"),
    ],
)
def test_wrong_models_are_named(text: Path, model: str, expected: str):
    refused(train(model, "--data", text, "--rank", 4), expected)


def test_only_the_config_of_a_hub_model_is_fetched(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def from_pretrained(name: Any) -> Any:
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match=r"organisation/name has no config to be read: no network"):
        read_config("organisation/name")
    assert asked == ["organisation/name"]


def test_presets_have_the_sizes_of_their_names():
    for name, millions in (("llama-60m", 58), ("llama-130m", 134), ("llama-350m", 367), ("llama-7b", 6738)):
        with torch.device("meta"):
            count = sum(p.numel() for p in fresh(name, device="meta").parameters())
        assert count // 10**6 == millions


def test_a_tokenizer_is_trained():
    tokenizer = trained_tokenizer(["the cat and the dog"] * 20, 270)
    assert 257 < len(tokenizer) <= 270
    assert len(tokenizer("the cat")["input_ids"]) < len(byte_tokenizer()("the cat")["input_ids"]) == 7
    assert tokenizer.decode(tokenizer("the né")["input_ids"]) == "the né"
    assert read_config("gpt2:hidden=32,layers=2,heads=2").n_embd == 32


CHOICES = {"num_processes": "2", "num_machines": "1", "mixed_precision": "no", "dynamo_backend": "no"}
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"],
    "accelerate": [
        *("accelerate.commands.launch", "--multi_gpu", "--no_python", "--main_process_port", "0"),
        *(word for name, value in CHOICES.items() for word in (f"--{name}", value)),
    ],
}  # accelerate starts several processes without a GPU only so; with --cpu it wants MPI


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_starts_the_same_run_in_two_processes(launcher: str, text: Path, tmp_path: Path):
    """With a tokenizer of its own; only the first speaks and writes."""
    shared = ["--data", text, "--rank", 4, "--set", "every=3", "--accumulate", 3, "--tokenizer", "pairs"]
    words = "llama:hidden=32,layers=2,heads=4,intermediate=48,vocab=300"
    one = train(words, *shared, "--clip", 1e9, "--out", tmp_path / "one", "--json", tmp_path / "one.json")
    assert one.exit_code == 0, one.output
    command = [sys.executable, "-m", *LAUNCHERS[launcher]]
    command += [sys.executable, "-c", "from rankwise.cli import main; main()", "train", words]
    sizes = ["--window", 32, "--batch", 2, "--steps", 4, "--lr", 0.02]
    more = [*sizes, *shared, "--out", tmp_path / "two", "--json", tmp_path / "two.json"]
    two = subprocess.run([*command, *map(str, more)], capture_output=True, text=True, timeout=300, check=False)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("held-out loss") == two.stderr.count("loading ") == 1
    ends = [rankwise.load(tmp_path / name)[0] for name in ("one", "two")]
    for p, q in zip(*(end.parameters() for end in ends), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert first["held_out"]["after"] == pytest.approx(second["held_out"]["after"], rel=1e-4)
    assert not (tmp_path / "two.partial").exists()


@pytest.mark.slow
def test_natural_gradients(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With fields in words, figures, and exact resume."""
    figures = tmp_path / "figures.json"
    words = [WORDS, "--data", text, "--rank", 4, "--every", 1, "--precondition", "sngd", "--json", figures]
    words += ["--precondition-set", "damping=0.5", "--precondition-set", "sharing=reduced"]
    whole = train(*words, "--precondition-set", "every=2", "--out", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    assert "preconditioned 4 steps, passed over 0: " in whole.stderr
    found = json.loads(figures.read_text())["precondition"]
    assert found["method"] == {
        "kind": "Sngd",
        "damping": 0.5,
        "every": 2,
        "together": False,
        "sharing": "reduced",
    }
    assert found["phases"]["invert"]["times"] == 2

    step, calls = running.Run._step, itertools.count(1)

    def killed(self: running.Run) -> Any:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return step(self)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(running.Run, "_step", killed)
        assert train(*words, "--precondition-set", "every=2", "--out", out).exit_code == 130
    refused(train(*words, "--out", out, "--resume"), "other precondition")
    result = train(*words, "--precondition-set", "every=2", "--out", out, "--resume")
    assert result.exit_code == 0, result.output
    assert same(tmp_path / "whole", out)


@pytest.mark.slow
@pytest.mark.parametrize("name", [command_name(name) for name in preconditioners.__all__])
def test_every_preconditioner_trains_a_language_model(name: str, text: Path, tmp_path: Path):
    figures = tmp_path / "figures.json"
    result = train(WORDS, "--data", text, "--rank", 4, "--precondition", name, "--json", figures)
    assert result.exit_code == 0, result.output
    assert json.loads(figures.read_text())["precondition"]["steps"] == 4


def test_hyphens_may_be_left_out():
    """In all registries, and no two names become one so."""
    for package in (adapters, compressors, initialisers, optimizers, preconditioners, projectors, rank_rules):
        known = registry(package)
        assert len({name.replace("-", "") for name in known}) == len(known)
        for name, method in known.items():
            assert pick("--method", name.replace("-", ""), known) is method
    assert pick("--precondition", "hylo", registry(preconditioners)) is preconditioners.HyLo
    with pytest.raises(ValueError, match=r"unknown 'hylos'; did you mean hy-lo\?"):
        pick("--precondition", "hylos", registry(preconditioners))


def test_types_have_names():
    found = build(preconditioners.MFac, ["storage=bfloat16", "gradients=2"])
    assert found == preconditioners.MFac(gradients=2, storage=torch.bfloat16)
    assert build(preconditioners.MFac, ["storage=none"]).storage is None
    with pytest.raises(ValueError, match="storage: must be one of bfloat16, float32, got 'short'"):
        build(preconditioners.MFac, ["storage=short"])


def test_natural_gradients_that_are_refused(text: Path):
    words = [WORDS, "--data", text, "--rank", 4]
    refused(train(*words, "--precondition-set", "damping=1"), "--precondition-set needs --precondition")
    refused(train(*words, "--precondition", "sngdd"), "--precondition: unknown 'sngdd'; did you mean sngd?")
    refused(train(*words, "--precondition", "sngd", "--layerwise"), "--layerwise", "leave one out")
    named = [*words, "--precondition", "sngd", "--precondition-set"]
    refused(train(*named, "sharing=none"), "--precondition-set sharing", "exact, expanded, reduced")
    refused(train(*named, "damping=much"), "--precondition-set damping", "must be float")
    refused(train(*named, "damping=-1"), "damping must be a number > 0")
    shown = run("list").stdout
    for line in ("sngd: ", "damping: float = 0.1", "sharing: exact | expanded | reduced = exact"):
        assert line in shown


def test_optimisers_that_need_a_rank_get_a_quarter(text: Path, tmp_path: Path):
    figures = tmp_path / "figures.json"
    result = train(WORDS, "--data", text, "--json", figures)
    assert result.exit_code == 0, result.output
    assert "galore gets rank=0.25" in result.stderr
    assert "without --out nothing of what is trained will be kept" in result.stderr
    looks = json.loads(figures.read_text())["looks"]
    told = [line for line in result.stderr.splitlines() if line.startswith("step ")]
    assert len(told) == len(looks) > 1
    assert f"held-out loss {looks[-1]['held_out']:.4f} nats a row" in told[-1]
    assert "gets rank" not in train(WORDS, "--data", text, "--rank", 2).stderr


def test_a_folder_without_a_checkpoint_is_no_stopped_run(text: Path, tmp_path: Path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    out, state = tmp_path / "out", tmp_path / "out.partial"
    words = [f"{WORDS},vocab=280", "--data", text, "--rank", 2, "--out", out]
    with monkeypatch.context() as context:
        context.setattr(checkpoint, "write_tensors", full)
        refused(train(*words), f"{state / CHECKPOINT} could not be written: No space left on device")
    assert [path.name for path in state.iterdir()] == ["tokenizer"]
    result = train(*words)
    assert result.exit_code == 0, result.output
    assert "training a tokenizer" in result.stderr  # that of the run before may be of other data
    assert not state.exists()
    state.mkdir()
    (state / "other").write_text("mine")
    shutil.rmtree(out)
    refused(train(*words), "out.partial", "holds something else")
    assert (state / "other").read_text() == "mine"


def test_judges_are_named(text: Path, tmp_path: Path):
    (tmp_path / "empty.txt").write_text(" ")
    words = [WORDS, "--data", text, "--rank", 2]
    refused(train(*words, "--eval", tmp_path / "empty.txt"), "--eval: the text", "empty.txt is empty")
    refused(train(*words, "--data", "topcs"), "--data: the text topcs does not exist; did you mean topics?")
    refused(run("train", "llama-60", "--data", text), "llama-60 does not exist; did you mean llama-60m?")
    refused(run("train", "llama:hiddens=64", "--data", text), "did you mean hidden?")
    refused(run("plan", "llama-60", "--memory", "1GiB"), "did you mean llama-60m?")
    refused(run("plan", "llama-60m", "--memory", 8), "--memory 8GiB")
