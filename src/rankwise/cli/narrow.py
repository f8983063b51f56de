"""``rankwise narrow``."""

from typing import Annotated

import typer

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
from .options import at_least, build, check_matches, layer_names, pick, where_option
from .work import DTYPES, LABELS, Work, calibrating, check_keep, judging


@app.command()
def narrow(
    model: Model,
    keep: Keep,
    multiple_of: Annotated[int, typer.Option(help="Numbers of neurons are multiples of it.")] = 32,
    settings: Settings = None,
    data: Data = None,
    calibration_tokens: CalibrationTokens = None,
    window: Window = None,
    labels: LabelKind = None,
    eval_: Eval = None,
    max_tokens: MaxTokens = None,
    eval_window: EvalWindow = None,
    where: WherePattern = None,
    dtype: Dtype = "auto",
    seed: Seed = None,
    out: Out = None,
    json: Json = None,
    html: Html = None,
) -> None:
    """Drop neurons and heads: a smaller ordinary model, which needs no rankwise to be used.

    Fields for --set are input_shrinkage, input_damping and output_damping.
    """
    check_keep(keep)
    sampling = calibrating(calibration_tokens, window, seed)
    sizes = judging(bool(eval_), max_tokens, eval_window)
    at_least("--multiple-of", multiple_of, 1)
    from ..compressors.loss_metric import Regularisers

    regularisers = build(Regularisers, settings or [])
    gradients = None if labels is None else pick("--labels", labels, LABELS)
    layers = where_option(where)
    precision = pick("--dtype", dtype, DTYPES)
    check_folder("--out", out)
    check_files(json, html, out)
    calibration, evaluation = data_texts(data or []), named_texts("--eval", eval_ or [])

    from .. import narrowing

    limit = sampling["tokens"] // max(len(calibration), 1)
    work = Work.begin(model, precision, calibration, evaluation, limit=limit, **sizes)
    check_matches("--where", where, layer_names(work.network))
    say(f"narrowing to keep {keep:g} of the params")
    report = narrowing.narrow(
        work.network,
        keep=keep,
        data=work.batches(sampling["window"]) if calibration else "self",
        regularisers=regularisers,
        multiple_of=multiple_of,
        where=layers,
        labels=gradients,
        **sampling,
    )
    work.evaluate("narrowed")
    work.finish(report, {}, out, json, html or (None if out is None else out / "report.html"))
