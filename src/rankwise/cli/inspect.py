"""``rankwise inspect``."""

from pathlib import Path
from typing import Annotated

import typer

from .app import app, say
from .compress import DTYPES
from .files import check_files, write_report
from .options import check_matches, layer_names, pick, where_option


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A folder, a hub id, a .gguf file, or an embedded model.")],
    where: Annotated[str | None, typer.Option(help="Regular expression on layer names.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
    html: Annotated[Path | None, typer.Option(help="File for the report.")] = None,
) -> None:
    """Measure the spectra of the weight matrices of a model; needs no data."""
    layers = where_option(where)
    precision = pick("--dtype", dtype, DTYPES)
    check_files(json, html)

    from .. import api, models

    say(f"loading {model}")
    network, _ = models.load(model, dtype=precision)
    check_matches("--where", where, layer_names(network))
    say("measuring its weights")
    report = api.inspect(network, where=layers)
    write_report(report, json, html)
    typer.echo(report.table())
