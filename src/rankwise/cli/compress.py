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
from ..core.rates import check_rate
from ..models.folded import empty_model
from ..models.load import find
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
from .files import check_files, check_folder, data_texts, named_texts
from .options import (
    at_least,
    build_mix,
    check_matches,
    duration,
    layer_names,
    only_with,
    pick,
    registry,
    where_option,
)
from .work import DTYPES, LABELS, Work, calibrating, check_keep, cut, file_bytes, judging, show


@app.command()
def compress(
    model: Model,
    keep: Keep,
    method: Annotated[str, typer.Option(help="See `rankwise list`; NAME+NAME mixes.")] = "kronecker-factored-svd",
    of: Annotated[str, typer.Option(help="What keep is a share of: params, bytes, macs or latency.")] = "params",
    latency_rows: Annotated[
        int | None, typer.Option(help="Input rows at once that latency is measured with; default: 64.")
    ] = None,
    allocate: Annotated[
        str | None, typer.Option(help="See `rankwise list`; default: what suits the method.")
    ] = None,
    gauge: Annotated[str | None, typer.Option(help="How low-rank matrices are stored: pivot or factors.")] = None,
    settings: Settings = None,
    data: Data = None,
    calibration_tokens: CalibrationTokens = None,
    window: Window = None,
    labels: LabelKind = None,
    eval_: Eval = None,
    max_tokens: MaxTokens = None,
    eval_window: EvalWindow = None,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Fit each block to what the compressed ones before it make.")
    ] = False,
    heal: Annotated[
        str | None,
        typer.Option(help="Train the new matrices so long, such as 90s or 10m, to agree with the model."),
    ] = None,
    heal_lr: Annotated[float | None, typer.Option(help="Largest learning rate of --heal; default: 5e-5.")] = None,
    heal_also: Annotated[
        str | None, typer.Option(help="Regular expression on other parameters to train, such as norm or bias.")
    ] = None,
    heal_checkpoint: Annotated[
        Path | None, typer.Option(help="Folder from which a stopped --heal goes on.")
    ] = None,
    where: WherePattern = None,
    dtype: Dtype = "auto",
    seed: Seed = None,
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
    check_keep(keep)
    sampling: Any = calibrating(calibration_tokens, window, seed)
    sizes = judging(bool(eval_), max_tokens, eval_window)
    at_least("--latency-rows", latency_rows, 1)
    from .. import allocators, compressors
    from ..compression import check_arguments
    from ..core.latency import time_matrices

    unit: Unit = pick("--of", of, {name: name for name in BUDGETS})
    words = [*(settings or []), *([] if gauge is None else [f"gauge={gauge}"])]
    chosen = build_mix(method, registry(compressors), words, compressors.Mixed)
    allocator = None if allocate is None else pick("--allocate", allocate, registry(allocators))
    gradients: Labels | None = None if labels is None else pick("--labels", labels, LABELS)
    layers = where_option(where)
    precision = pick("--dtype", dtype, DTYPES)
    seconds = None if heal is None else duration("--heal", heal)
    beside = where_option(heal_also, "--heal-also")
    healing_flags = {"--heal-lr": heal_lr, "--heal-also": heal_also, "--heal-checkpoint": heal_checkpoint}
    only_with("--heal, such as --heal 10m", heal is not None, healing_flags)
    if heal_lr is not None:
        check_rate(heal_lr, "--heal-lr")
    only_with("--of latency", unit == "latency", {"--latency-rows": latency_rows})
    slopes = any(need.side != "input" for need in chosen.needs)
    only_with(f"a method that reads gradients, unlike {method}", slopes, {"--labels": labels})
    reader = f"a method that reads data, unlike {method}"
    read = {"--data": data, "--calibration-tokens": calibration_tokens, "--window": window, "--seed": seed}
    only_with(f"{reader}, or --sequential or --heal", bool(chosen.needs or sequential or heal), read)
    check_folder("--out", out)
    check_files(json, html, out)
    html_at = html or (None if out is None else out / "report.html")
    calibration, evaluation = data_texts(data or []), named_texts("--eval", eval_ or [])
    limit = sampling["tokens"] // max(len(calibration), 1)

    from .. import api, models, streaming, training

    if stream:
        if out is None:
            raise ValueError("--stream needs --out, the folder for the compressed model.")
        if heal is not None:
            raise ValueError(
                "--stream does not heal: that needs the whole model in memory; leave one of them out."
            )
        if evaluation:
            raise ValueError("--stream does not evaluate; run rankwise evaluate on the new folder afterwards.")
        if chosen.needs and not calibration:
            raise ValueError("--stream cannot sample from a model that is not in memory; give texts with --data.")
        dense = empty_model(find(model))[0]
        check_matches("--where", where, layer_names(dense))
        say(f"compressing {model} block by block; a run that is killed continues when it is started again")
        heads, *_ = cut(models.load_tokenizer(model) if calibration else None, calibration, [], limit, 0)
        report = streaming.compress_folder(
            model,
            out,
            chosen,
            keep=keep,
            data=[batch for ids in heads for batch in batches_of(ids, window=sampling["window"])] or None,
            of=unit,
            allocate=allocator,
            sequential=sequential,
            where=layers,
            labels=gradients,
            seed=sampling["seed"],
            dtype=precision,
        )
        counted = {"dense": models.sizes(dense.to(precision)), "compressed": models.sizes(empty_model(out)[0])}
        figures = {**report.totals, "perplexity": {}, "sizes": counted, "file_bytes": file_bytes(out)}
        show(report, model, figures, json, html_at)
        return
    check_arguments(chosen, keep, unit, sequential)
    work = Work.begin(model, precision, calibration, evaluation, limit=limit, **sizes)
    network = work.network
    check_matches("--where", where, layer_names(network))
    check_matches("--heal-also", heal_also, [name for name, _ in network.named_parameters()])
    batches = work.batches(sampling["window"])
    say(f"compressing with {method} to keep {keep:g} of the {unit}")
    source: Any = batches if calibration else "self"
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
        timer=functools.partial(time_matrices, **({} if latency_rows is None else {"rows": latency_rows})),
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
        try:
            healed = training.heal(
                network,
                before,
                data=training.portions(work.unscored, sampling["window"]) if work.unscored else "self",
                budget=seconds,
                checkpoint=heal_checkpoint,
                also=None if beside is None else (lambda name: beside(name, network)),
                autocast=torch.bfloat16 if next(before.parameters()).dtype is torch.bfloat16 else None,
                **({} if heal_lr is None else {"lr": heal_lr}),
                **sampling,
            )
        except KeyboardInterrupt:
            if heal_checkpoint is not None and (heal_checkpoint / training.CHECKPOINT).is_file():
                say(f"stopped; the healing is in {heal_checkpoint}, and the same command goes on from it")
            raise
        say(healed.title)
        healing = {"healing": healed.to_dict()}
        work.evaluate("healed")
    work.finish(report, healing, out, json, html_at)
