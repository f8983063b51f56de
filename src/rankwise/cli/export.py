"""``rankwise export``."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from .app import app, say
from .files import check_folder
from .options import build, pick, registry


@app.command()
def export(
    model: Annotated[
        str,
        typer.Argument(help="A folder, compressed or not, a hub id, an embedded model, or an adapter's folder."),
    ],
    to: Annotated[str, typer.Option(help="dense, gguf or onnx; of an adapter lora, merged, absorbed or delta.")],
    out: Annotated[Path, typer.Option(help="New folder for the files.")],
    base: Annotated[str | None, typer.Option(help="The model that an adapter was made for.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Most memory for one tensor of an adapted model: 2GiB.")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="field=value of the format.")] = None,
) -> None:
    """Write a model, or an adapter and the model under it, in a format that other tools read."""
    from .. import exporters

    kind = pick("--to", to, registry(exporters))
    given = {"base": base, "memory": memory}
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name, value in given.items():
        if value is not None and name not in fields:
            known = registry(exporters).items()
            takes = " or ".join(key for key, each in known if name in each.__dataclass_fields__)
            raise ValueError(f"--{name} is for adapters and for --to {takes}, not for --to {to}.")
    if "base" in fields and base is None:
        raise ValueError(f"--to {to} needs --base, the model that the adapter was made for.")
    words = [f"{name}={value}" for name, value in given.items() if value is not None]
    chosen = build(kind, [*words, *(settings or [])])
    check_folder("--out", out)

    from .. import api

    say(f"exporting {model} to {to}")
    api.export(model, chosen, out)
    for file in sorted(out.iterdir()):
        typer.echo(f"{file.stat().st_size / 1e6:10.1f} MB  {file}")
