"""The README's code runs, on a tiny random model in place of the real one and with fewer tokens."""

import json
import re
import shlex
from pathlib import Path

import pytest
from tiny import llama
from typer.testing import CliRunner

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
MODEL = "smollm2-135m"
FEWER = {
    "compress": ["--calibration-tokens", "512", "--window", "128"],
    "evaluate": ["--max-tokens", "1024"],
    "narrow": ["--calibration-tokens", "512", "--window", "128"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run in, with a Llama of two layers whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(["<s>", *letters, "th"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("readme")
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    llama(vocab_size=len(vocabulary), initializer_range=0.3, **ends).save_pretrained(folder / MODEL)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")
    fast.save_pretrained(folder / MODEL)
    pair = json.dumps({"prompt": "the question ", "completion": "the answer"})
    (folder / "pairs.jsonl").write_text(f"{pair}\n" * 20, encoding="utf-8")
    return folder


@pytest.mark.slow
def test_python_blocks_run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(place)
    assert len(blocks("python")) >= 3
    for code in blocks("python"):
        code = code.replace(f'"{MODEL}"', f'"./{MODEL}"').replace("keep=0.8)", "keep=0.8, tokens=512)")
        exec(compile(code, "README.md", "exec"), {})
    assert (place / "smollm2-small" / "config.json").is_file()
    assert (place / "report.html").stat().st_size > 1000
    assert "PivotedLowRank" in capsys.readouterr().out


@pytest.mark.slow
def test_command_lines_run(place: Path, monkeypatch: pytest.MonkeyPatch):
    from rankwise.cli import app

    monkeypatch.chdir(place)
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("rankwise ")]
    assert len(lines) >= 5
    for line in lines:
        shorter = {MODEL: f"./{MODEL}", "10m": "2s"}
        words = [shorter.get(word, word) for word in shlex.split(line)[1:]]
        judged = ["--max-tokens", "1024"] if words[0] == "compress" and "--eval" in words else []
        result = CliRunner().invoke(app, [*words, *FEWER.get(words[0], []), *judged])
        assert result.exit_code == 0, f"{line}\n{result.output}"
    assert (place / "merged" / "config.json").is_file()
    for name in ("spectra.json", "small.json", "small/config.json", "small/report.html", "small-gguf/model.gguf"):
        assert (place / name).is_file()
