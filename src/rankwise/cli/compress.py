"""``rankwise compress``."""

import copy
import functools
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..core.choices import BUDGETS, Unit
from ..core.data import batches_of
from ..core.labels import Labels
from .app import app, say
from .arguments import (
    CalibrationTokens,
    Data,
    Dtype,
    Eval,
    EvalWindow,
    Html,
    Json,
    Keep,
    LabelKind,
    MaxTokens,
    Model,
    Out,
    Seed,
    Settings,
    WherePattern,
    Window,
)
from .files import check_file, check_folder, data_texts, named_texts
from .options import at_least, build_mix, duration, pick, registry, where_option
from .work import DTYPES, LABELS, Work, check_sizes, cut, file_bytes, show


@app.command()
def compress(
    model: Model,
    keep: Keep,
    method: Annotated[str, typer.Option(help="See `rankwise list`; NAME+NAME mixes.")] = "kronecker-factored-svd",
    of: Annotated[str, typer.Option(help="What keep is a share of: params, bytes, macs or latency.")] = "params",
    latency_rows: Annotated[int, typer.Option(help="Input rows at once that latency is measured with.")] = 64,
    allocate: Annotated[
        str | None, typer.Option(help="See `rankwise list`; default: what suits the method.")
    ] = None,
    gauge: Annotated[str | None, typer.Option(help="How low-rank matrices are stored: pivot or factors.")] = None,
    settings: Settings = None,
    data: Data = None,
    calibration_tokens: CalibrationTokens = 24576,
    window: Window = 512,
    labels: LabelKind = None,
    eval_: Eval = None,
    max_tokens: MaxTokens = 16384,
    eval_window: EvalWindow = 1024,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Fit each block to what the compressed ones before it make.")
    ] = False,
    heal: Annotated[
        str | None,
        typer.Option(help="Train the new matrices so long, such as 90s or 10m, to agree with the model."),
    ] = None,
    heal_lr: Annotated[float, typer.Option(help="Largest learning rate of --heal.")] = 5e-5,
    heal_also: Annotated[
        str | None, typer.Option(help="Regular expression on other parameters to train, such as norm or bias.")
    ] = None,
    heal_checkpoint: Annotated[
        Path | None, typer.Option(help="Folder from which a stopped --heal goes on.")
    ] = None,
    where: WherePattern = None,
    dtype: Dtype = "auto",
    seed: Seed = 0,
    out: Out = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="For a model larger than memory; run again to continue. Needs --out.")
    ] = False,
    json: Json = None,
    html: Html = None,
) -> None:
    """Compress a model to a budget, evaluate it before and after, and save it.

    With --stream only one block at a time is in memory. A run that was killed continues where it was when the
    same command is given again; what it needs for that lies in the folder OUT.partial until OUT is complete.
    """
    check_sizes(keep, calibration_tokens, window, max_tokens, eval_window)
    at_least("--latency-rows", latency_rows, 1)
    from .. import allocators, compressors
    from ..core.latency import time_matrices

    unit: Unit = pick("--of", of, {name: name for name in BUDGETS})
    words = [*(settings or []), *([] if gauge is None else [f"gauge={gauge}"])]
    chosen = build_mix(method, registry(compressors), words, compressors.Mixed)
    allocator = None if allocate is None else pick("--allocate", allocate, registry(allocators))
    gradients: Labels | None = None if labels is None else pick("--labels", labels, LABELS)
    layers = where_option(where)
    precision = pick("--dtype", dtype, DTYPES)
    seconds = None if heal is None else duration("--heal", heal)
    if not heal_lr > 0:
        raise ValueError(f"--heal-lr must be > 0, got {heal_lr}.")
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
        heads, *_ = cut(models.load_tokenizer(model) if calibration else None, calibration, [], limit, max_tokens)
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
        show(report, model, figures, json, html_at)
        return
    work = Work.begin(
        model, precision, calibration, evaluation, limit=limit, max_tokens=max_tokens, window=eval_window
    )
    network = work.network
    batches = work.batches(window)
    say(f"compressing with {method} to keep {keep:g} of the {unit}")
    source: Any = batches if calibration else "self"
    sampling: Any = {"tokens": calibration_tokens, "window": window, "seed": seed}
    needs = chosen.needs
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
        labels=gradients,
        **sampling,
    )
    work.evaluate("compressed")
    healing: dict[str, Any] = {}
    if before is not None and seconds is not None:
        say(f"healing for {heal}")
        healed = training.heal(
            network,
            before,
            data=training.portions(work.unscored, window) if work.unscored else "self",
            lr=heal_lr,
            budget=seconds,
            checkpoint=heal_checkpoint,
            also=None if beside is None else (lambda name: beside(name, network)),
            autocast=torch.bfloat16 if next(before.parameters()).dtype is torch.bfloat16 else None,
            **sampling,
        )
        say(healed.title)
        healing = {"healing": healed.to_dict()}
        work.evaluate("healed")
    work.finish(report, healing, out, json, html_at)
