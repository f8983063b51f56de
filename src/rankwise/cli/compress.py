"""``rankwise compress``."""

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from ..core.choices import BUDGETS, Unit
from ..core.data import batches_of
from ..core.labels import Labels
from ..core.report import Report
from ..models.texts import tokens
from .app import app, say
from .files import Text, check_file, check_folder, data_texts, named_texts, write_report
from .options import at_least, build_mix, duration, pick, registry, where_option

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


@app.command()
def compress(
    model: Annotated[str, typer.Argument(help="A folder, a hub id, a .gguf file, or an embedded model.")],
    keep: Annotated[float, typer.Option(help="Size afterwards as a share of the size before, in (0, 1].")],
    method: Annotated[str, typer.Option(help="See `rankwise list`; NAME+NAME mixes.")] = "kronecker-factored-svd",
    of: Annotated[str, typer.Option(help="What keep is a share of: params, bytes, macs or latency.")] = "params",
    latency_rows: Annotated[int, typer.Option(help="Input rows at once that latency is measured with.")] = 64,
    allocate: Annotated[
        str | None, typer.Option(help="See `rankwise list`; default: what suits the method.")
    ] = None,
    gauge: Annotated[str | None, typer.Option(help="How low-rank matrices are stored: pivot or factors.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="field=value of the method.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="self (the default), text files, topics or python.")
    ] = None,
    calibration_tokens: Annotated[
        int, typer.Option(help="Tokens to calibrate with, shared by all texts.")
    ] = 24576,
    window: Annotated[int, typer.Option(help="Length of a calibration sequence.")] = 512,
    labels: Annotated[str | None, typer.Option(help="Labels of the gradients: sampled or data.")] = None,
    eval_: Annotated[list[str] | None, typer.Option("--eval", help="NAME=FILE, topics or python.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Evaluate on the last so many tokens of a text.")] = 16384,
    eval_window: Annotated[int, typer.Option(help="Length of an evaluation window.")] = 1024,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Fit each block to what the compressed ones before it make.")
    ] = False,
    heal: Annotated[
        str | None,
        typer.Option(help="Train the new matrices so long, such as 90s or 10m, to agree with the model."),
    ] = None,
    heal_method: Annotated[str, typer.Option(help="See `rankwise list`.")] = "kronecker-factored",
    heal_also: Annotated[
        str | None, typer.Option(help="Regular expression on other parameters to train, such as norm or bias.")
    ] = None,
    heal_checkpoint: Annotated[
        Path | None, typer.Option(help="Folder from which a stopped --heal goes on.")
    ] = None,
    where: Annotated[str | None, typer.Option(help="Regular expression on layer names.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    seed: Annotated[int, typer.Option(help="For sampled sequences and labels.")] = 0,
    out: Annotated[Path | None, typer.Option(help="New folder for the compressed model.")] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="For a model larger than memory; run again to continue. Needs --out.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
    html: Annotated[Path | None, typer.Option(help="File for the report; default: report.html in --out.")] = None,
) -> None:
    """Compress a model to a budget, evaluate it before and after, and save it.

    With --stream only one block at a time is in memory. A run that was killed continues where it was when the
    same command is given again; what it needs for that lies in the folder OUT.partial until OUT is complete.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"--keep must be > 0 and <= 1, got {keep}.")
    for flag, value, least in (
        ("--calibration-tokens", calibration_tokens, 1),
        ("--window", window, 2),
        ("--latency-rows", latency_rows, 1),
        ("--max-tokens", max_tokens, 2),
        ("--eval-window", eval_window, 2),
    ):
        at_least(flag, value, least)
    from .. import allocators, compressors, preconditioners
    from ..core import labels as kinds
    from ..core.latency import time_matrices

    unit: Unit = pick("--of", of, {name: name for name in BUDGETS})
    words = [*(settings or []), *([] if gauge is None else [f"gauge={gauge}"])]
    chosen = build_mix(method, registry(compressors), words, compressors.Mixed)
    allocator = None if allocate is None else pick("--allocate", allocate, registry(allocators))
    gradients: Labels | None = (
        None if labels is None else pick("--labels", labels, {"sampled": kinds.sampled, "data": kinds.given})
    )
    layers = where_option(where)
    precision = pick("--dtype", dtype, DTYPES)
    seconds = None if heal is None else duration("--heal", heal)
    healer = pick("--heal-method", heal_method, registry(preconditioners))()
    beside = where_option(heal_also, "--heal-also")
    for flag, value in (("--heal-checkpoint", heal_checkpoint), ("--heal-also", heal_also)):
        if heal is None and value is not None:
            raise ValueError(f"{flag} needs --heal, such as --heal 10m.")
    check_folder("--out", out)
    check_file("--json", json)
    html_at = html or (None if out is None else out / "report.html")
    check_file("--html", html)
    calibration, evaluation = data_texts(data or []), named_texts("--eval", eval_ or [])
    limit = calibration_tokens // max(len(calibration), 1)

    from .. import api, models, streaming, training

    if stream:
        if out is None:
            raise ValueError("--stream needs --out, the folder for the compressed model.")
        if evaluation:
            raise ValueError("--stream does not evaluate; run rankwise evaluate on the new folder afterwards.")
        if chosen.needs and not calibration:
            raise ValueError("--stream cannot sample from a model that is not in memory; give texts with --data.")
        say(f"compressing {model} block by block; a run that is killed continues when it is started again")
        heads, _ = cut(models.load_tokenizer(model) if calibration else None, calibration, [], limit, max_tokens)
        report = streaming.compress_folder(
            model,
            out,
            chosen,
            keep=keep,
            data=[batch for ids in heads for batch in batches_of(ids, window=window)] or None,
            of=unit,
            allocate=allocator,
            sequential=sequential,
            where=layers,
            labels=gradients,
            seed=seed,
            dtype=precision,
        )
        figures = {**report.totals, "perplexity": {}, "file_bytes": file_bytes(out)}
        finish(report, model, figures, json, html_at)
        return
    say(f"loading {model}")
    network, tokenizer = models.load(model, dtype=precision)
    heads, tails = cut(tokenizer, calibration, evaluation, limit, max_tokens)
    batches = [batch for ids in heads for batch in batches_of(ids, window=window)]
    sizes = {"dense": models.sizes(network)}
    dense = _perplexities(network, tokenizer, tails, eval_window, "the dense model")
    say(f"compressing with {method} to keep {keep:g} of the {unit}")
    source: Any = batches if calibration else "self"
    sampling: Any = {"tokens": calibration_tokens, "window": window, "seed": seed}
    needs = [*chosen.needs, *(() if seconds is None else healer.needs)]
    statistics = (
        api.calibrate(network, needs, data=source, where=layers, labels=gradients, **sampling) if needs else None
    )
    before = None if seconds is None else copy.deepcopy(network)
    report = api.compress(
        network,
        chosen,
        keep=keep,
        data=source if statistics is None else statistics,
        of=unit,
        timer=functools.partial(time_matrices, rows=latency_rows),
        allocate=allocator,
        sequential=sequential,
        where=layers,
    )
    after = {"compressed": _perplexities(network, tokenizer, tails, eval_window, "the compressed model")}
    healing: dict[str, Any] = {}
    if before is not None and seconds is not None:
        say(f"healing for {heal} with {heal_method}")
        healed = training.heal(
            network,
            before,
            data=training.portions(heads, window) if heads else "self",
            method=healer,
            budget=seconds,
            statistics=statistics,
            checkpoint=heal_checkpoint,
            also=None if beside is None else (lambda name: beside(name, network)),
            autocast=torch.bfloat16 if next(before.parameters()).dtype is torch.bfloat16 else None,
            **sampling,
        )
        say(healed.title)
        healing = {"healing": healed.to_dict()}
        after["healed"] = _perplexities(network, tokenizer, tails, eval_window, "the healed model")
    totals: dict[str, Any] = {
        **report.totals,
        **healing,
        "perplexity": {
            name: {"dense": dense[name]} | {stage: after[stage][name] for stage in after} for name in tails
        },
        "sizes": sizes | {"compressed": models.sizes(network)},
        "predicted_file_bytes": models.predicted_bytes(network),
    }
    if out is not None:
        say(f"saving to {out}")
        models.save(network, out, tokenizer)
        totals["file_bytes"] = file_bytes(out)
    finish(report, model, totals, json, html_at)


def finish(report: Report, model: str, totals: Mapping[str, Any], json: Path | None, html: Path | None) -> None:
    """Write the report with its last figures, and print its summary."""
    report = dataclasses.replace(report, title=f"{model}, {report.title}", totals=totals)
    write_report(report, json, html)
    typer.echo(summary(report))


def cut(
    tokenizer: Any, calibration: Sequence[Text], evaluation: Sequence[Text], limit: int, max_tokens: int
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Take the first tokens of the calibration texts and the last ones of the evaluation texts.

    Raises:
        ValueError: if they would overlap in a text that is used for both.
    """
    heads, taken = [], {}
    for text in calibration:
        ids = tokens(tokenizer, text.content, limit=limit, name=text.name)
        heads.append(ids)
        taken[text.origin] = len(ids)
    tails = {}
    for text in evaluation:
        ids = tokens(tokenizer, text.content, name=text.name)
        tails[text.name] = ids[-max_tokens:]
        first = taken.get(text.origin, 0)
        if first + len(tails[text.name]) > len(ids):
            raise ValueError(
                f"--data and --eval overlap: {text.name} has {len(ids)} tokens, of which the first {first} "
                f"calibrate and the last {len(tails[text.name])} evaluate; "
                "lower --calibration-tokens or --max-tokens."
            )
    return heads, tails


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


def _perplexities(
    network: Any, tokenizer: Any, texts: Mapping[str, Tensor], window: int, what: str
) -> dict[str, float]:
    if not texts:
        return {}
    from .. import models

    say(f"evaluating {what} on {', '.join(texts)}")
    report = models.evaluate(network, tokenizer, texts, window=window)
    return {row["name"]: row["perplexity"] for row in report.rows}
