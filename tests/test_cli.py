"""The command line on a tiny random language model: results, files, and one-line errors."""

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import WORDS, gpt2, saved, worded
from transformers import T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner, Result

from rankwise import Report, __version__, compressors
from rankwise.cli import app, main
from rankwise.cli.files import Text, data_texts, named_texts
from rankwise.cli.work import cut
from rankwise.core import running
from rankwise.quickstart import FULL, SMOKE, quickstart


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Keep sampled sequences out of the user's cache."""
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Llama of two layers with a tokenizer of whole words, saved by plain transformers."""
    return saved(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A text of 2000 words."""
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randint(len(WORDS), (2000,), generator=generator).tolist()
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(WORDS[i] for i in chosen), encoding="utf-8")
    return path


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def small(folder: Path, text: Path, *more: object) -> list[object]:
    """The words of a quick ``compress``; later ones win."""
    sizes = ["--calibration-tokens", 512, "--window", 64]
    judged = ["--max-tokens", 512, "--eval-window", 64] if "--eval" in more else []
    return ["compress", folder, "--keep", 0.8, "--data", text, *sizes, *judged, *more]


def refused(result: Result, *expected: str) -> None:
    """Check for exit code 2 and one line ``error: ...`` that holds the words."""
    assert result.exit_code == 2, result.output
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in result.output
    for word in expected:
        assert word in last


def test_a_budget_of_time(folder, text, monkeypatch, tmp_path):
    from rankwise.core import latency

    rows_seen = set()

    def by_macs(matrices, *, rows):
        rows_seen.add(rows)
        return [10.0 * matrix.macs for matrix in matrices]

    monkeypatch.setattr(latency, "time_matrices", by_macs)
    figures = tmp_path / "figures.json"
    result = run(*small(folder, text, "--of", "latency", "--latency-rows", 7, "--json", figures))
    assert result.exit_code == 0, result.output
    totals = json.loads(figures.read_text())
    assert rows_seen == {7}
    assert 0.7 < totals["keep"]["latency"] <= 0.8
    assert totals["timings"]


def test_version():
    assert run("--version").stdout.strip() == f"rankwise {__version__}"


@pytest.mark.slow
def test_the_package_is_a_command_too():
    command = [sys.executable, "-m", "rankwise", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"rankwise {__version__}"


def test_list_names_everything_with_fields():
    shown = run("list").stdout
    fields = ("gauge: pivot | factors = pivot", "input_damping: float = 1e-06")
    for name in ("kronecker-factored-svd: ", "water-filling: ", "spectrum-tail: ", "gguf: ", *fields):
        assert name in shown


def test_compress_writes_model_figures_and_report(folder, text, tmp_path):
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    result = run(*small(folder, text, "--eval", f"words={text}", "--out", out, "--json", figures))
    assert result.exit_code == 0, result.output
    found = json.loads(figures.read_text())
    assert set(found["keep"]) == {"params", "bytes", "macs"}
    assert 0.7 < found["keep"]["params"] <= 0.8
    assert set(found["perplexity"]["words"]) == {"dense", "compressed"}
    assert all(value >= 0 for value in found["seconds"].values())
    assert found["peak_memory_bytes"] > 0
    keys = {"name", "kind", "rank", "params_before", "params_after", "predicted_error", "measured_error"}
    assert len(found["layers"]) == 14
    assert all(set(layer) == keys for layer in found["layers"])
    assert found["file_bytes"] == pytest.approx(found["predicted_file_bytes"], rel=0.02)
    assert "<svg" in (out / "report.html").read_text()
    again = tmp_path / "again.json"
    measured = ["--text", f"words={text}", "--window", 64, "--max-tokens", 512, "--json", again]
    assert run("evaluate", out, *measured).exit_code == 0
    (row,) = next(value for value in json.loads(again.read_text()).values() if isinstance(value, list))
    assert row["perplexity"] == pytest.approx(found["perplexity"]["words"]["compressed"], rel=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.json", "figures.json", "out"]


def test_narrow_writes_an_ordinary_model(folder, text, tmp_path):
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    words = ["--eval", f"words={text}", "--multiple-of", 8, "--set", "input_shrinkage=0.01", "--where", "mlp"]
    _, *rest = small(folder, text, *words, "--out", out, "--json", figures)
    result = run("narrow", *rest)
    assert result.exit_code == 0, result.output
    found = json.loads(figures.read_text())
    assert found["method"]["input_shrinkage"] == 0.01
    assert found["widths"] == {"intermediate_size": [48, 32]}
    assert set(found["perplexity"]["words"]) == {"dense", "narrowed"}
    assert found["file_bytes"] == pytest.approx(found["predicted_file_bytes"], rel=0.02)
    assert found["sizes"]["narrowed"]["bytes"] < found["sizes"]["dense"]["bytes"]
    config = json.loads((out / "config.json").read_text())
    assert config["intermediate_size"] == 32
    assert "quantization_config" not in config
    assert "<svg" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--keep", 0], ["--keep must be > 0"]),
        (["--multiple-of", 0], ["--multiple-of must be at least 1"]),
        (["--set", "rank=3"], ["no field 'rank'", "input_shrinkage"]),
        (["--keep", 0.1], ["the budget cannot be met", "keep must be at least"]),
        (["--where", "q_proj"], ["no number in the config"]),
    ],
)
def test_narrow_names_what_is_wrong(folder, text, tmp_path, words, expected):
    _, *rest = small(folder, text, "--out", tmp_path / "out", *words)
    refused(run("narrow", *rest), *expected)
    assert not list(tmp_path.iterdir())


def test_method_options_reach_the_method(folder, text, tmp_path):
    figures = tmp_path / "figures.json"
    words = ["--method", "kronecker-factored-svd", "--set", "input_damping=1e-4", "--gauge", "factors"]
    words += ["--allocate", "uniform", "--of", "bytes", "--where", "q_proj", "--labels", "data"]
    words += ["--json", figures]
    result = run(*small(folder, text, *words))
    assert result.exit_code == 0, result.output
    found = json.loads(figures.read_text())
    assert found["method"]["input_damping"] == 1e-4
    assert found["method"]["gauge"] == "factors"
    assert [layer["name"].rpartition(".")[2] for layer in found["layers"]] == ["q_proj"] * 2
    assert found["keep"]["bytes"] <= 0.8


@pytest.mark.slow
def test_methods_are_mixed(folder, text, tmp_path):
    figures, out = tmp_path / "figures.json", tmp_path / "out"
    words = ["--method", "kronecker-factored-svd+gptq", "--set", "input_damping=1e-4", "--set", "group=16"]
    words += ["--of", "bytes", "--keep", 0.3, "--out", out, "--json", figures, "--eval", f"words={text}"]
    result = run(*small(folder, text, *words))
    assert result.exit_code == 0, result.output
    found = json.loads(figures.read_text())
    low_rank, gptq = found["method"]["methods"]
    assert (low_rank["name"], low_rank["gauge"]) == ("KroneckerFactoredSvd", "pivot")
    assert (gptq["name"], gptq["group"]) == ("Gptq", 16)
    assert low_rank["input_damping"] == gptq["input_damping"] == 1e-4
    assert found["keep"]["bytes"] <= 0.3
    assert "Quantized" in {layer["kind"] for layer in found["layers"]}
    assert found["file_bytes"] == pytest.approx(found["predicted_file_bytes"], rel=0.05)
    again = tmp_path / "again.json"
    measured = ["--text", f"words={text}", "--window", 64, "--max-tokens", 512, "--json", again]
    assert run("evaluate", out, *measured).exit_code == 0
    (row,) = next(value for value in json.loads(again.read_text()).values() if isinstance(value, list))
    assert row["perplexity"] == pytest.approx(found["perplexity"]["words"]["compressed"], rel=1e-5)


def test_compress_without_data(folder, tmp_path):
    figures = tmp_path / "figures.json"
    words = ["--data", "self", "--calibration-tokens", 256, "--window", 64, "--json", figures]
    result = run("compress", folder, "--keep", 0.7, *words)
    assert result.exit_code == 0, result.output
    assert json.loads(figures.read_text())["keep"]["params"] <= 0.7


def test_inspect(folder, tmp_path):
    figures, page = tmp_path / "figures.json", tmp_path / "page.html"
    result = run("inspect", folder, "--json", figures, "--html", page)
    assert result.exit_code == 0, result.output
    layers = json.loads(figures.read_text())["layers"]
    assert len(layers) == 14
    assert {"name", "shape", "params", "stable_rank", "alpha", "effective_rank"} <= set(layers[0])
    assert "<svg" in page.read_text()


@pytest.mark.parametrize("keep", ["0", "-1", "1.5", "nan"])
def test_bad_keep(folder, text, keep):
    refused(run(*small(folder, text, "--keep", keep)), "--keep must be > 0 and <= 1")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--method", "kroneker-svd"], ["did you mean kronecker-factored-svd", "plain-svd"]),
        (["--method", "gptq+gptk"], ["did you mean gptq"]),
        (["--method", "gptq+plain-svd"], ["measure errors by the loss"]),
        (["--method", "gptq+mixed"], ["measure errors by the loss"]),
        (["--method", "gptq+mixed", "--set", "methods=gptq"], ["none of gptq+mixed has a field 'methods'"]),
        (["--method", "mixed", "--set", "methods=gptq"], ["no field 'methods'"]),
        (["--allocate", "water-filing"], ["water-filling", "greedy"]),
        (["--of", "latency", "--latency-rows", 0], ["--latency-rows must be at least 1"]),
        (["--of", "flops"], ["params, bytes, macs"]),
        (["--set", "damping=1"], ["no field 'damping'", "input_damping: float", "gauge: pivot | factors"]),
        (["--set", "input_damping=lots"], ["must be float, got 'lots'"]),
        (["--set", "input_damping=-1"], ["input_damping"]),
        (["--set", "input_damping"], ["field=value"]),
        (["--set", "gauge=pivot", "--gauge", "factors"], ["given twice"]),
        (["--gauge", "round"], ["pivot, factors"]),
        (["--labels", "mine"], ["sampled, data"]),
        (["--dtype", "int8"], ["bfloat16"]),
        (["--where", "("], ["regular expression"]),
        (["--where", "nothing_like_it"], ["--where 'nothing_like_it' fits no name"]),
        (["--where", "norm"], ["--where 'norm' fits no name"]),
        (["--window", "1"], ["--window must be at least 2"]),
        (["--calibration-tokens", "0"], ["--calibration-tokens must be at least 1"]),
        (["--data", "self"], ["cannot be combined"]),
        (["--data", "missing.txt"], ["missing.txt", "does not exist"]),
        (["--eval", "words"], ["NAME=FILE", "topics"]),
        (["--eval", "words=missing.txt"], ["missing.txt", "does not exist"]),
        (["--json", "missing/figures.json"], ["--json", "does not exist"]),
        (["--out", "missing/out"], ["--out", "does not exist"]),
        (["--html", "."], ["is a folder"]),
        (["--keep", "0.0001"], ["keep must be at least"]),
    ],
)
def test_bad_options(folder, text, tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    refused(run(*small(folder, text, "--out", "model", *words)), *expected)
    assert not list(tmp_path.iterdir())


def test_missing_folder(text, tmp_path):
    refused(run(*small(tmp_path / "nowhere", text)), "nowhere")


def test_existing_output_is_kept(folder, text, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    refused(run(*small(folder, text, "--out", tmp_path)), "exists already")
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_empty_texts(folder, text, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    refused(run(*small(folder, empty)), "empty")
    refused(run(*small(folder, text, "--eval", f"nothing={empty}")), "empty")


def test_healing_may_use_all_that_is_not_evaluated():
    def tokenizer(text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    both, alone = (
        Text(name, name, " ".join(map(str, range(low, low + 10)))) for name, low in (("a", 0), ("b", 50))
    )
    heads, unscored, tails = cut(tokenizer, [both, alone], [both], limit=3, max_tokens=4)
    assert [ids.tolist() for ids in heads] == [[0, 1, 2], [50, 51, 52]]
    assert [ids.tolist() for ids in unscored] == [list(range(6)), list(range(50, 60))]
    assert {name: ids.tolist() for name, ids in tails.items()} == {"a": [6, 7, 8, 9]}


def test_calibration_and_evaluation_must_not_overlap(folder, text):
    words = ["--eval", f"words={text}", "--calibration-tokens", 1500, "--max-tokens", 501]
    refused(run(*small(folder, text, *words)), "overlap", "2000")


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to / "model.safetensors"


def test_truncated_weights(folder, text, tmp_path):
    weights = copied(folder, tmp_path / "cut")
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(run(*small(tmp_path / "cut", text, "--out", tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_nan_weight(folder, text, tmp_path):
    weights = copied(folder, tmp_path / "nan")
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    out = tmp_path / "out"
    refused(run(*small(tmp_path / "nan", text, "--out", out)), "model.layers.1.mlp.up_proj", "NaN")
    refused(run("inspect", tmp_path / "nan"), "model.layers.1.mlp.up_proj")
    assert not out.exists()


def test_wrong_spec(folder, text, tmp_path):
    out = tmp_path / "out"
    assert run(*small(folder, text, "--out", out)).exit_code == 0
    config = json.loads((out / "config.json").read_text())
    written = json.dumps(config["quantization_config"])
    assert '"rank": ' in written
    number = written.split('"rank": ')[1].split(",")[0].split("}")[0]
    config["quantization_config"] = json.loads(written.replace(f'"rank": {number}', '"rank": 3'))
    (out / "config.json").write_text(json.dumps(config))
    refused(run("evaluate", out, "--text", f"words={text}"))


def test_interrupt_leaves_nothing(folder, text, tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compressors.KroneckerFactoredSvd, "choices", interrupted)
    result = run(*small(folder, text, "--out", tmp_path / "out", "--json", tmp_path / "figures.json"))
    assert result.exit_code == 130
    assert result.stderr.strip().splitlines()[-1].startswith("interrupted")
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_error(folder, text):
    result = run("--debug", *small(folder, text, "--keep", 2))
    assert isinstance(result.exception, ValueError)


@pytest.mark.slow
def test_quickstart_goes_on_where_it_stopped(folder, tmp_path, monkeypatch):
    both = dataclasses.replace(SMOKE, keeps=FULL.keeps)
    monkeypatch.setattr(sys.modules[quickstart.__module__], "SMOKE", both)
    told: list[str] = []
    out = tmp_path / "quick"
    first = quickstart(out, smoke=True, source=str(folder), progress=told.append)
    assert {"keep-0.9", "keep-0.8", "report.html", "inspect.html", "cache"} == {p.name for p in out.iterdir()}
    assert set(first.totals["models"]) == {"dense", "keep-0.9", "keep-0.8"}
    assert max(first.totals["largest difference of a logit after reloading"].values()) < 1e-5
    assert not any("earlier run" in line for line in told)
    told.clear()
    (out / "cache" / "keep-0.8.json").unlink()
    (out / "keep-0.8").rename(out / "cache" / "keep-0.8")
    second = quickstart(out, smoke=True, source=str(folder), progress=told.append)
    assert sum("earlier run" in line for line in told) == 6
    assert second.totals["models"] == {
        **first.totals["models"],
        "keep-0.8": second.totals["models"]["keep-0.8"],
    }
    report = json.loads(second.to_json())
    assert [layer["rank"] for layer in report["layers"]] == [layer["rank"] for layer in first.rows]


def test_quickstart_does_not_remove_what_it_did_not_make(folder, tmp_path):
    mine = tmp_path / "keep-0.8" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(ValueError, match="not made by an earlier quickstart"):
        quickstart(tmp_path, smoke=True, source=str(folder))
    assert mine.exists()


def test_quickstart_ends_with_a_table(tmp_path, monkeypatch):
    rows = {"dense": {"file_bytes": 5_000_000, "perplexity topics": 9.5, "prefill_tokens_per_s": 1234.5}}

    def made(out: Path, *, smoke: bool) -> Report:
        assert (out, smoke) == (tmp_path, True)
        return Report("Quickstart", totals={"models": rows | {"keep-0.9": rows["dense"]}})

    monkeypatch.setattr("rankwise.quickstart.quickstart", made)
    shown = run("quickstart", "--smoke", "--out", tmp_path).stdout
    for word in ("keep-0.9", "MB", "prefill tokens/s", "1,234.50"):
        assert word in shown


@pytest.mark.slow
def test_healing_is_reported_beside_the_compression(folder, text, tmp_path):
    words = small(folder, text, "--keep", 0.6, "--eval", f"words={text}", "--json", tmp_path / "r.json")
    words += ["--heal", "3s", "--heal-checkpoint", tmp_path / "state", "--heal-also", "norm", "--max-tokens", 256]
    result = run(*words)
    assert "healed" in result.stdout, result.output
    told = json.loads((tmp_path / "r.json").read_text())
    looks = told["healing"]["looks"]
    assert told["healing"]["held_out"] == {
        "before": looks[0]["held_out"],
        "after": min(x["held_out"] for x in looks),
    }
    assert set(told["perplexity"]["words"]) == {"dense", "compressed", "healed"}
    assert (tmp_path / "state" / "healing.safetensors").is_file()


@pytest.mark.parametrize("time", ["10", "0s", "m", "ten minutes"])
def test_a_wrong_time_is_named(folder, text, time):
    refused(run(*small(folder, text, "--heal", time)), "--heal takes a time such as 90s, 10m or 1h", time)


@pytest.mark.parametrize("flag", ["--heal-checkpoint", "--heal-also"])
def test_flags_about_healing_need_it(folder, text, flag):
    refused(run(*small(folder, text, flag, "x")), f"{flag} needs --heal")


@pytest.mark.slow
def test_compress_a_stream(folder, text, tmp_path):
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    result = run(*small(folder, text, "--stream", "--out", out, "--json", figures))
    assert result.exit_code == 0, result.output
    assert "Traceback" not in result.output
    found = json.loads(figures.read_text())
    assert found["file_bytes"] == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    known = tmp_path / "known.json"
    result = run(*small(folder, text, "--json", known))
    assert result.exit_code == 0, result.output
    wanted = json.loads(known.read_text())
    assert found["keep"] == wanted["keep"]
    assert found["sizes"] == wanted["sizes"]
    assert "<svg" in (out / "report.html").read_text()
    measured = ["--text", f"words={text}", "--window", 64, "--max-tokens", 512]
    assert run("evaluate", out, *measured).exit_code == 0
    refused(run(*small(folder, text, "--stream")), "--out")
    refused(run(*small(folder, text, "--stream", "--out", tmp_path / "x", "--eval", f"words={text}")), "evaluate")
    without = ["compress", folder, "--keep", 0.8, "--stream", "--out", tmp_path / "x"]
    refused(run(*without), "--data")
    refused(run(*without, "--method", "plain-svd", "--where", "nowhere"), "--where 'nowhere' fits no name")
    assert run(*without, "--method", "plain-svd").exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--sequential"], ["--stream", "--out", "out"]])
def test_tokens_and_windows_must_fit_the_model(text, tmp_path, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    for name, size in (("short", len(WORDS) + 3), ("few", 64)):
        gpt2(vocab_size=size).save_pretrained(name)
        worded().save_pretrained(name)
    refused(run(*small(Path("short"), text, *more)), "window 64 is longer than the 32 positions")
    refused(run(*small(Path("few"), text, "--window", 16, *more)), "vocabulary has 64 entries", "own tokenizer")
    assert run(*small(Path("short"), text, "--window", 32, *more)).exit_code == 0


def test_a_model_without_a_tokenizer_is_named(text, tmp_path):
    gpt2().save_pretrained(tmp_path / "bare")
    refused(run(*small(tmp_path / "bare", text)), "the model has no tokenizer")
    refused(run("evaluate", tmp_path / "bare", "--text", f"words={text}", "--window", 16), "has no tokenizer")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--stream", "--out", "out", "--heal", "10s"], ["--stream does not heal"]),
        (["--heal", "10s", "--heal-also", "zzz"], ["--heal-also 'zzz' fits no name"]),
        (["--heal-lr", 1e-4], ["--heal-lr needs --heal"]),
        (["--heal", "10s", "--heal-lr", "inf"], ["--heal-lr must be a number > 0, got inf"]),
        (["--latency-rows", 8], ["--latency-rows needs --of latency"]),
        (["--max-tokens", 64], ["--max-tokens needs --eval"]),
        (["--eval-window", 64], ["--eval-window needs --eval"]),
        (["--method", "plain-svd"], ["--data needs a method that reads data, unlike plain-svd"]),
        (["--method", "plain-svd", "--sequential", "--labels", "data"], ["--labels needs a method"]),
        (["--method", "whitened-svd", "--labels", "data"], ["--labels needs a method that reads gradients"]),
        (["--json", "a/../x", "--html", "x"], ["--json and --html are both"]),
        (["--out", "x", "--json", "a/../x"], ["--out and --json are both"]),
    ],
)
def test_flags_that_would_do_nothing_are_refused(folder, text, tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    refused(run(*small(folder, text, *words)), *expected)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("flag", ["--calibration-tokens", "--window", "--seed"])
def test_sizes_of_a_calibration_that_is_not_made_are_refused(flag, folder, tmp_path):
    words = ["compress", folder, "--method", "plain-svd", "--keep", 0.9, "--out", tmp_path / "out"]
    refused(run(*words, flag, 9), f"{flag} needs a method that reads data, unlike plain-svd")
    assert list(tmp_path.iterdir()) == []


def test_figures_go_through_links_and_into_pipes(folder, tmp_path):
    target, link, pipe = tmp_path / "target.html", tmp_path / "link.html", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert run("inspect", folder, "--json", pipe, "--html", link).exit_code == 0
        assert len(json.loads(os.read(reader, 2**20))["layers"]) == 14
    finally:
        os.close(reader)
    assert link.is_symlink()
    assert "<svg" in target.read_text()
    assert pipe.is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.html", "pipe", "target.html"]


def test_a_model_that_takes_more_than_text_is_named(text, tmp_path):
    sizes = {"vocab_size": 64, "d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    made = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    made.save_pretrained(tmp_path / "t5")
    worded().save_pretrained(tmp_path / "t5")
    words = ["compress", tmp_path / "t5", "--keep", "0.9", "--data", text]
    refused(run(*words), "T5ForConditionalGeneration takes more than the tokens of a text; give batches")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only some systems have a device that is always full")
def test_a_full_disk_is_named(folder, tmp_path):
    place = tmp_path / "full.json"
    place.symlink_to("/dev/full")  # so that a fault replaces the link, and not the device
    refused(run("inspect", folder, "--json", place), f"{place} could not be written: No space left")


def test_an_unexpected_error_is_one_line(folder, text, monkeypatch):
    def broken(*_: object) -> None:
        raise IndexError("out of range")

    monkeypatch.setattr(compressors.KroneckerFactoredSvd, "choices", broken)
    result = run(*small(folder, text))
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "error: IndexError: out of range (rankwise --debug ... shows where)"
    assert isinstance(run("--debug", *small(folder, text)).exception, IndexError)


def test_a_stopped_healing_says_how_to_go_on(folder, text, tmp_path, monkeypatch):
    def stopped(self: running.Run) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running.Run, "_step", stopped)
    result = run(*small(folder, text, "--heal", "20s", "--heal-checkpoint", tmp_path / "state"))
    assert result.exit_code == 130
    assert "the same command goes on from it" in result.stderr
    assert "goes on" not in run(*small(folder, text, "--heal", "20s")).stderr


def test_all_may_read_a_saved_model(folder, tmp_path):
    run("compress", folder, "--keep", 0.5, "--method", "plain-svd", "--out", tmp_path / "out")
    wanted = (tmp_path / "out").stat().st_mode & 0o666
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {wanted}


def test_export_writes_a_folder_and_lists_its_files(folder, tmp_path):
    assert (
        run("compress", folder, "--keep", 0.5, "--method", "plain-svd", "--out", tmp_path / "small").exit_code
        == 0
    )
    result = run("export", tmp_path / "small", "--to", "dense", "--out", tmp_path / "dense")
    assert result.exit_code == 0, result.output
    files = {path.name for path in (tmp_path / "dense").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
    assert all(name in result.stdout for name in files)


def test_export_refuses_in_one_line(folder, tmp_path):
    out = ("--out", tmp_path / "out")
    refused(run("export", folder, "--to", "dense", *out), "dense already")
    refused(run("export", folder, "--to", "gguf", *out), "WordLevel", "byte-level BPE")
    refused(
        run("export", folder, "--to", "ggu", *out), "did you mean gguf?", "delta, dense, gguf, lora, merged, onnx"
    )
    refused(run("export", folder, "--to", "gguf", "--set", "dtype=q4", *out), "f16, bf16, f32")
    refused(run("export", tmp_path / "nowhere", "--to", "dense", *out), "nowhere", "does not exist")
    refused(run("export", folder, "--to", "dense", "--out", folder), "exists already")
    assert list(tmp_path.iterdir()) == []


def test_lines_are_read_as_texts_everywhere(folder, text, tmp_path):
    lines, plain = tmp_path / "lines.jsonl", tmp_path / "plain.txt"
    halves = text.read_text()[:4000], text.read_text()[4000:]
    lines.write_text("".join(json.dumps({"text": half}) + "\n" for half in halves))
    plain.write_text("\n".join(halves))
    (first,), (second,) = data_texts([str(lines)]), data_texts([str(plain)])
    assert first.content == second.content
    (judge,) = named_texts("--eval", [f"mine={lines}"])
    assert judge.content == second.content
    assert judge.origin == first.origin  # so that an overlap is seen
    figures = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, file in zip((lines, plain), figures, strict=True):
        assert run("evaluate", folder, "--text", f"w={path}", "--window", 64, "--json", file).exit_code == 0
    one, two = (json.loads(file.read_text())["texts"][0]["perplexity"] for file in figures)
    assert one == two
    for value in (None, 3, ["a", "b"], " "):
        lines.write_text(json.dumps({"text": halves[0]}) + "\n" + json.dumps({"text": value}) + "\n")
        with pytest.raises(ValueError, match=r'line 2 has no "text" with words in it'):
            named_texts("--eval", [f"mine={lines}"])


def test_a_text_given_twice_is_refused(folder, text, tmp_path):
    (tmp_path / "link.txt").symlink_to(text)
    for words in ([text, text], [text, tmp_path / "link.txt"], ["python", "python"]):
        more = [word for each in words for word in ("--data", each)]
        refused(run("compress", folder, "--keep", 0.8, *more), f"--data: the text {words[1]} is given twice")


def test_little_data_is_told(folder, text, tmp_path):
    (tmp_path / "few.txt").write_text(" ".join(WORDS[:21]))
    assert "only 21 of the 512 tokens" in run(*small(folder, tmp_path / "few.txt", "--keep", 0.5)).stderr
    assert "only" not in run(*small(folder, text, "--method", "whitened-svd")).stderr


def test_the_list_is_plain_text():
    assert ":class:" not in run("list").stdout
    assert "`" not in run("list").stdout.replace("`rankwise", "")


def test_weights_of_adapters_name_the_formats(folder, tmp_path):
    words = ["--to", "dense", "--out", tmp_path / "out", "--weights", "0.5"]
    refused(run("export", folder, *words), "--weights, are for --to", "merged", "not for --to dense")


def test_warnings_are_one_line(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", None)
    monkeypatch.setattr("sys.argv", ["rankwise", "--version"])
    with pytest.raises(SystemExit):
        main()
    warnings.showwarning(RuntimeWarning("step 3\nis skipped"), RuntimeWarning, "file.py", 7)
    assert capsys.readouterr().err == "warning: step 3 is skipped\n"
