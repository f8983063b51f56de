"""``rankwise export``."""

from pathlib import Path
from typing import Annotated

import typer

from .app import app, say
from .files import check_folder
from .options import build, pick, registry


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A folder, compressed or not, a hub id, or an embedded model.")],
    to: Annotated[str, typer.Option(help="See `rankwise list`: dense, gguf or onnx.")],
    out: Annotated[Path, typer.Option(help="New folder for the files.")],
    settings: Annotated[list[str] | None, typer.Option("--set", help="field=value of the format.")] = None,
) -> None:
    """Write a model in a format that other tools read."""
    from .. import exporters

    chosen = build(pick("--to", to, registry(exporters)), settings or [])
    check_folder("--out", out)

    from .. import api

    say(f"exporting {model} to {to}")
    api.export(model, chosen, out)
    for file in sorted(out.iterdir()):
        typer.echo(f"{file.stat().st_size / 1e6:10.1f} MB  {file}")
