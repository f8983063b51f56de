"""``rankwise adapt`` on tiny models: figures, files, resume, classifiers, and one-line errors."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_cli import folder as folder
from test_cli import refused, run
from test_cli import text as text
from tiny import WORDS, worded
from transformers import AutoModelForSequenceClassification, OPTConfig, OPTForCausalLM

import rankwise
from rankwise.cli.several import NEEDED
from rankwise.core import running
from rankwise.models.adapter_files import TENSORS

PAIRS = [{"prompt": f"{a} ", "completion": f"{b} {a}"} for a, b in itertools.pairwise(WORDS)]


def saved(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / TENSORS)


@pytest.fixture
def data(tmp_path) -> Path:
    return lines(tmp_path / "pairs.jsonl", PAIRS)


def lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def adapt(folder: Path, data: Path, *more: object):
    sizes = ["--rank", 2, "--window", 32, "--batch", 2, "--steps", 4, "--lr", 0.02]
    return run("adapt", folder, "--data", data, *sizes, *more)


@pytest.mark.parametrize("method", ["eva", "lora"])
def test_an_adapter_is_trained_and_reported(folder, data, tmp_path, method):
    out, figures, page = tmp_path / "out", tmp_path / "figures.json", tmp_path / "page.html"
    words = ["--method", method, "--steps", 12, "--out", out, "--json", figures, "--html", page]
    words += ["--calibration-tokens", 200] if method == "eva" else []
    result = adapt(folder, data, *words, "--set", "alpha=4", "--where", "q_proj|v_proj", "--also", "norm")
    assert result.exit_code == 0, result.output
    found = json.loads(figures.read_text())
    assert found["method"]["alpha"] == 4.0
    assert {layer["name"].rpartition(".")[2] for layer in found["layers"]} == {"q_proj", "v_proj"}
    held = found["training"]["held_out"]
    assert held["after"] < held["before"]
    assert found["training"]["memory"]["gradients"] == 4 * found["trained"] == 4 * found["training"]["trained"]
    assert f"{held['before']:.4f} -> {held['after']:.4f} nats a label in 12 steps" in result.stdout
    assert "model.layers.0.self_attn.q_proj" in result.stdout
    assert "predicted   weights" in result.stderr
    assert "measured    rise" in result.stderr
    assert "<svg" in page.read_text() or "<table" in page.read_text()
    assert not (tmp_path / "out.partial").exists()
    tensors = saved(out)
    assert sum(tensor.numel() for tensor in tensors.values()) == found["trained"]
    assert any("norm" in name for name in tensors)
    again, _ = rankwise.load(str(folder))
    rankwise.load_adapter(again, out)
    trained = {name: p for name, p in again.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == found["trained"]


def test_text_is_judged_by_another_text(folder, text, data, tmp_path):
    figures = tmp_path / "figures.json"
    result = adapt(
        folder, text, "--window", 40, "--eval", data, "--accumulate", 2, "--every", 1, "--json", figures
    )
    assert result.exit_code == 0, result.output
    found = json.loads(figures.read_text())["training"]
    assert [row["step"] for row in found["looks"]] == [0, 1, 2, 3, 4]
    assert found["rows"] == 4 * 2 * 2 * 39  # the first token of a window is not learned


def test_one_pass_is_the_default(folder, data, tmp_path):
    figures = tmp_path / "figures.json"
    words = ["--window", 32, "--batch", 2, "--json", figures, "--method", "lora", "--epochs", 2]
    result = run("adapt", folder, "--data", data, *words)
    assert result.exit_code == 0, result.output
    found = json.loads(figures.read_text())["training"]
    learned = len(PAIRS) - round(0.1 * len(PAIRS))
    assert found["rows"] == 2 * 3 * learned  # two words and the end, twice


def test_a_stopped_run_goes_on(folder, data, tmp_path, monkeypatch):
    whole = adapt(folder, data, "--every", 1, "--out", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    step, calls = running.Run._step, itertools.count(1)

    def interrupted(self):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(running.Run, "_step", interrupted)
    out = tmp_path / "out"
    result = adapt(folder, data, "--every", 1, "--out", out)
    assert result.exit_code == 130
    assert "--resume goes on from it" in result.stderr
    assert not out.exists()
    assert (tmp_path / "out.partial").exists()
    monkeypatch.setattr(running.Run, "_step", step)
    refused(adapt(folder, data, "--every", 1, "--out", out), "out.partial", "--resume")
    refused(adapt(folder, data, "--every", 1, "--out", out, "--lr", 0.1, "--resume"), "(other lr)")
    refused(adapt(folder, data, "--every", 1, "--out", out, "--set", "alpha=3", "--resume"), "(other adapters)")
    result = adapt(folder, data, "--every", 1, "--out", out, "--resume")
    assert result.exit_code == 0, result.output
    first, second = (saved(tmp_path / name) for name in ("whole", "out"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert not (tmp_path / "out.partial").exists()
    assert "starts anew" in adapt(folder, data, "--out", tmp_path / "new", "--resume").stderr


def test_texts_of_a_model_that_mixes_windows_get_their_own(data, text, tmp_path):
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    sizes = {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "num_hidden_layers": 1}
    config = OPTConfig(vocab_size=len(WORDS) + 3, num_attention_heads=4, **sizes, **ends)
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    worded().save_pretrained(tmp_path / "opt")
    for source in (data, text):
        result = adapt(tmp_path / "opt", source)
        assert result.exit_code == 0, result.output
        assert "OPTForCausalLM lets texts of one window see each other" in result.stderr


def test_several_processes_are_refused_before_anything_is_written(folder, data, tmp_path, monkeypatch):
    for name in NEEDED:
        monkeypatch.setenv(name, "2" if name == "WORLD_SIZE" else "0")
    refused(
        adapt(folder, data, "--out", tmp_path / "new"), "rankwise adapt runs in one process", "rankwise.follow"
    )
    assert {path.name for path in tmp_path.iterdir()} == {data.name}
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert adapt(folder, data).exit_code == 0


def test_a_classifier(folder, tmp_path):
    records = [{"text": f"{w} {'ban' if i % 2 else 'das'}", "label": i % 2} for i, w in enumerate(WORDS)]
    data, figures = lines(tmp_path / "labels.jsonl", records), tmp_path / "figures.json"
    words = ["--batch", 8, "--steps", 40, "--lr", 0.01, "--json", figures, "--out", tmp_path / "out"]
    result = adapt(folder, data, *words)
    assert result.exit_code == 0, result.output
    found = json.loads(figures.read_text())
    assert found["accuracy"]["after"] == 1.0
    assert found["training"]["improved"]
    (head,) = [tensor for name, tensor in saved(tmp_path / "out").items() if "score.weight" in name]
    assert head.shape == (2, 32)
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == ["0", "1"]
    words = ["--base", folder, "--to", "merged", "--out", tmp_path / "merged"]
    assert run("export", tmp_path / "out", *words).exit_code == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.score.weight, head)
    assert merged.config.id2label == {0: "0", 1: "1"}
    assert "score" not in {layer["name"] for layer in found["layers"]}
    other = lines(tmp_path / "other.jsonl", [{"text": "ban", "label": "new"}])
    refused(adapt(folder, data, "--eval", other), "label 'new' is none of 0, 1")
    one = lines(tmp_path / "one.jsonl", [{"text": "ban", "label": "new"}] * 3)
    refused(adapt(folder, one), "one label only, 'new'")


def test_modules_between_layers_are_saved(folder, data, tmp_path):
    out = tmp_path / "out"
    words = ["--method", "compacter", "--set", "reduction=4", "--window", 32, "--steps", 2, "--out", out]
    result = run("adapt", folder, "--data", data, *words)
    assert result.exit_code == 0, result.output
    report = rankwise.load_adapter(rankwise.load(str(folder))[0], out)
    assert len(report.rows) == 4
    words = ["--base", folder, "--to", "merged", "--out", tmp_path / "merged"]
    refused(run("export", out, *words), "neither merged nor exported")


def test_half_precision_runs_under_autocast(folder, data, tmp_path):
    result = adapt(folder, data, "--dtype", "bfloat16", "--also", "norm", "--gradient-checkpointing")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--method", "lorra"], ["did you mean lora?"]),
        (["--method", "lora", "--set", "start=svd"], ["--set start: must be one of", "singular-vectors"]),
        (["--rank", 0], ["rank must be an integer >= 1, got 0"]),
        (["--rank", 1000], ["rank", "1000"]),
        (["--set", "rank=3"], ["rank is given twice"]),
        (["--where", "nothing_like_it"], ["--where 'nothing_like_it' fits no name"]),
        (["--where", "norm"], ["--where 'norm' fits no name"]),
        (["--also", "zzz"], ["--also 'zzz' fits no name"]),
        (["--epochs", 2], ["--steps and --epochs both say how long to train"]),
        (["--set", "alphas=2"], ["no field 'alphas'; did you mean alpha?"]),
        (["--also", "("], ["--also is not a regular expression"]),
        (["--steps", 0], ["--steps must be at least 1"]),
        (["--window", 1], ["--window must be at least 2"]),
        (["--window", 4096], ["window 4096 is longer than the 2048 positions"]),
        (["--lr", 0], ["--lr must be a positive number"]),
        (["--eval", "missing.jsonl"], ["missing.jsonl", "does not exist"]),
        (["--out", "missing/out"], ["--out", "does not exist"]),
        (["--resume"], ["--resume needs --out"]),
        (["--patience", 0], ["--patience must be at least 1"]),
    ],
)
def test_wrong_words_are_named(folder, data, words, expected):
    refused(adapt(folder, data, *words), *expected)


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([{"text": "ban", "label": True}], ["line 1", "or a whole number", "got True"]),
        ([{"text": "ban", "label": "x "}], ["line 1", "without spaces around it", "got 'x '"]),
        ([{"text": "ban", "label": " "}], ["line 1", "got ' '"]),
        ([{"text": "ban", "label": 1}, {"text": "ban"}], ["line 2", "as all lines for a classifier do"]),
        ([{"text": "ban das"}, {"text": "ban", "label": 1}], ["line 2", "only a classifier learns"]),
        ([{"text": "ban", "prompt": "ban", "completion": "das"}], ["line 1", "two forms of an example"]),
        ([{"prompt": "ban", "completion": "das", "answer": "bon"}], ["prompt with completion and of question"]),
        ([{"text": ""}], ["line 1", "words in it"]),
        ([{"prompt": "ban", "completion": " "}], ["line 1", '"completion" with words in it']),
    ],
)
def test_mixed_and_empty_lines_are_named(folder, tmp_path, records, expected):
    refused(adapt(folder, lines(tmp_path / "data.jsonl", records)), *expected)


def test_numbers_are_labels_in_their_order(folder, tmp_path):
    records = [{"text": f"{a} {b}", "label": i % 12 - 1} for i, (a, b) in enumerate(itertools.pairwise(WORDS))]
    data, text = lines(tmp_path / "data.jsonl", records), tmp_path / "plain.txt"
    data.write_bytes(b"\xef\xbb\xbf" + data.read_bytes().replace(b"\n", b"\r\n"))  # as some editors do
    result = adapt(folder, data, "--method", "lora", "--steps", 1, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert rankwise.models.read_labels(tmp_path / "out") == tuple(map(str, range(-1, 11)))
    text.write_text("ban das")
    refused(adapt(folder, data, "--eval", text), "plain.txt must be .jsonl")


def test_damaged_data_is_named(folder, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "ban"}\n{"text": ')
    refused(adapt(folder, path), "data.jsonl, line 2 is no JSON")


def test_methods_in_fields_are_set_by_name(folder, data, tmp_path):
    figures = tmp_path / "figures.json"
    words = ["--method", "lora", "--set", "start=singular-vectors", "--set", "ranks=explained-variance"]
    result = adapt(folder, data, *words, "--json", figures)
    assert result.exit_code == 0, result.output
    found = json.loads(figures.read_text())
    assert "SingularVectors" in json.dumps(found["method"])
    assert len({layer["rank"] for layer in found["layers"]}) > 1
    shown = run("list").stdout
    assert "| principal-inputs | singular-vectors | uniform = uniform" in shown
    assert "ranks: explained-variance | predicted-decrease" in shown


@pytest.mark.slow
def test_the_embedded_model(tmp_path):
    data, figures = tmp_path / "pairs.jsonl", tmp_path / "figures.json"
    lines(data, [{"question": f"What is {i} plus {i}?", "answer": f"{2 * i}."} for i in range(20)])
    words = ["--method", "lora", "--rank", 4, "--steps", 2, "--out", tmp_path / "out", "--json", figures]
    result = run("adapt", "smollm2-135m", "--data", data, *words)
    assert result.exit_code == 0, result.output
    found = json.loads(figures.read_text())
    assert found["training"]["steps"] == 2
    assert found["training"]["improved"]
    assert len(found["layers"]) == 210
    assert (tmp_path / "out").is_dir()
