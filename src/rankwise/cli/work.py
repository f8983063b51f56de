"""What commands share that make a model smaller: texts cut to tokens, figures before and after, files."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import typer
from torch import Tensor

from ..core import labels as kinds
from ..core.data import batches_of
from ..core.methods import check_seed
from ..core.report import Report
from ..core.statistics import Batch
from ..core.supervision import CHECKPOINT
from ..models.causal import reads_tokens_alone
from ..models.texts import tokens
from .app import say
from .files import Text, write_report
from .options import at_least, only_with

ENOUGH = 0.5  # share of the calibration tokens, below which there is a word of warning
TOKENIZER = "tokenizer"  # beside a checkpoint
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
LABELS = {"sampled": kinds.sampled, "data": kinds.given}


def check_keep(keep: float) -> None:
    """Raise if a share is none."""
    if not 0 < keep <= 1:
        raise ValueError(f"--keep must be > 0 and <= 1, got {keep}.")


def calibrating(tokens: int | None, window: int | None, seed: int | None) -> dict[str, int]:
    """Return the sizes of the calibration and its seed, or raise if one is out of range."""
    at_least("--calibration-tokens", tokens, 1)
    at_least("--window", window, 2)
    check_seed("--seed", seed or 0)
    return {"tokens": tokens or 24576, "window": window or 512, "seed": seed or 0}


def judging(judged: bool, max_tokens: int | None, window: int | None) -> dict[str, int]:
    """Return the sizes of the evaluation, or raise if one is out of range or has no text."""
    only_with("--eval", judged, {"--max-tokens": max_tokens, "--eval-window": window})
    at_least("--max-tokens", max_tokens, 2)
    at_least("--eval-window", window, 2)
    return {"max_tokens": max_tokens or 16384, "window": window or 1024}


@dataclass(frozen=True)
class Work:
    """A model that is made smaller, and what is known of it before and after.

    Args:
        source: what the command calls the model.
        network: the model.
        tokenizer: its tokenizer.
        heads: token ids to calibrate with.
        unscored: all token ids of these texts that are not evaluated.
        tails: token ids to evaluate on, by name.
        window: of the evaluation.
        perplexity: of each text, by stage.
        sizes: of the model, by stage.
    """

    source: str
    network: Any
    tokenizer: Any
    heads: Sequence[Tensor]
    unscored: Sequence[Tensor]
    tails: Mapping[str, Tensor]
    window: int
    perplexity: dict[str, dict[str, float]] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        source: str,
        dtype: torch.dtype | None,
        calibration: Sequence[Text],
        evaluation: Sequence[Text],
        *,
        limit: int,
        max_tokens: int,
        window: int,
    ) -> Self:
        """Load a model and evaluate it."""
        from .. import models

        say(f"loading {source}")
        network, tokenizer = models.load(source, dtype=dtype)
        if (calibration or evaluation) and not reads_tokens_alone(network):
            raise ValueError(
                f"{type(network).__name__} takes more than the tokens of a text; give batches from Python, or a "
                "method that needs no data."
            )
        work = cls(
            source, network, tokenizer, *cut(tokenizer, calibration, evaluation, limit, max_tokens), window
        )
        work.evaluate("dense")
        return work

    def batches(self, window: int) -> list[Batch]:
        """Return the calibration data in sequences of a length."""
        return [batch for ids in self.heads for batch in batches_of(ids, window=window)]

    def evaluate(self, stage: str) -> None:
        """Note the sizes and the perplexities of the model as it is now."""
        from .. import models

        self.sizes[stage] = models.sizes(self.network)
        if self.tails:
            say(f"evaluating the {stage} model on {', '.join(self.tails)}")
            for row in models.evaluate(self.network, self.tokenizer, self.tails, window=self.window).rows:
                self.perplexity.setdefault(row["name"], {})[stage] = row["perplexity"]

    def finish(
        self, report: Report, more: Mapping[str, Any], out: Path | None, json: Path | None, html: Path | None
    ) -> None:
        """Save the model, write the report with all figures, and print its summary."""
        from .. import models

        totals = {
            **report.totals,
            **more,
            "perplexity": self.perplexity,
            "sizes": self.sizes,
            "predicted_file_bytes": models.predicted_bytes(self.network),
        }
        if out is not None:
            say(f"saving to {out}")
            models.save(self.network, out, self.tokenizer)
            totals["file_bytes"] = file_bytes(out)
        show(report, self.source, totals, json, html)


def show(report: Report, model: str, totals: Mapping[str, Any], json: Path | None, html: Path | None) -> None:
    """Write the report with its last figures, and print its summary."""
    report = dataclasses.replace(report, title=f"{model}, {report.title}", totals=totals)
    write_report(report, json, html)
    typer.echo(summary(report))


def cut(
    tokenizer: Any, calibration: Sequence[Text], evaluation: Sequence[Text], limit: int, max_tokens: int
) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """Take the first tokens of the calibration texts and the last ones of the evaluation texts.

    Returns:
        the first tokens of each calibration text, all tokens of it that are not evaluated, and the last tokens
        of the evaluation texts by name.

    Raises:
        ValueError: if they would overlap in a text that is used for both.
    """
    whole = {text.origin: tokens(tokenizer, text.content, name=text.name) for text in calibration}
    tails, scored = {}, {}
    for text in evaluation:
        known = whole.get(text.origin)
        ids = tokens(tokenizer, text.content, name=text.name) if known is None else known
        tails[text.name] = ids[-max_tokens:]
        scored[text.origin] = len(tails[text.name])
        first = 0 if known is None else min(limit, len(ids))
        if first + len(tails[text.name]) > len(ids):
            raise ValueError(
                f"--data and --eval overlap: {text.name} has {len(ids)} tokens, of which the first {first} "
                f"calibrate and the last {len(tails[text.name])} evaluate; "
                "lower --calibration-tokens or --max-tokens."
            )
    heads = [ids[:limit] for ids in whole.values()]
    found, wanted = sum(map(len, heads)), limit * len(heads)
    if found < ENOUGH * wanted:
        say(f"--data has only {found:,} of the {wanted:,} tokens that calibration would read; more is better")
    return heads, [ids[: len(ids) - scored.get(origin, 0)] for origin, ids in whole.items()], tails


def file_bytes(folder: Path) -> int:
    """Return the size of the weight files of a saved model."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def summary(report: Report) -> str:
    """Return the totals of a compression as a few lines of text."""
    lines = [
        report.title,
        "keep        " + "  ".join(f"{k} {v:.4f}" for k, v in report.totals["keep"].items()),
    ]
    for name, each in report.totals["perplexity"].items():
        lines.append(f"perplexity  {name}: " + ", ".join(f"{stage} {value:.3f}" for stage, value in each.items()))
    if "file_bytes" in report.totals:
        lines.append(f"file        {report.totals['file_bytes'] / 1e6:.1f} MB")
    lines.append("seconds     " + "  ".join(f"{k} {v:.1f}" for k, v in report.totals["seconds"].items()))
    return "\n".join(lines)


def partial_folder(out: Path | None, resume: bool) -> Path | None:
    """Return the folder for checkpoints.

    Raises:
        ValueError: if one is there and it is not said what to do with it, or the folder holds something else.
    """
    if out is None:
        if resume:
            raise ValueError("--resume needs --out, beside which the checkpoint of the stopped run lies.")
        say("without --out nothing of what is trained will be kept")
        return None
    state = out.with_name(f"{out.name}.partial")
    if stopped(state):
        if not resume:
            raise ValueError(
                f"{state} holds the checkpoint of a stopped run; give --resume to go on, or remove it."
            )
        return state
    if state.exists() and (not state.is_dir() or any(map(_is_foreign, state.iterdir()))):
        raise ValueError(
            f"{state}, the place for checkpoints, holds something else; remove it or give another --out."
        )
    if resume:
        say(f"{state} holds no checkpoint: there is nothing to go on from, so this run starts anew")
    return state


def stopped(state: Path | None) -> bool:
    """Whether a folder holds the checkpoint of a stopped run."""
    return state is not None and (state / CHECKPOINT).is_file()


def _is_foreign(path: Path) -> bool:
    """Whether something is not what a run leaves that failed before its first checkpoint."""
    return path.name != TOKENIZER and not path.name.startswith(f".{CHECKPOINT}.")


def in_words(memory: Mapping[str, int | None]) -> str:
    """Return sizes in bytes as one line."""
    sizes = {name: "unknown" if size is None else f"{size / 1e6:,.1f} MB" for name, size in memory.items()}
    return "  ".join(f"{name} {size}" for name, size in sizes.items())
