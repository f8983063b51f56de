"""``rankwise export``."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from .app import app, say
from .files import check_folder
from .options import build, pick, registry


@app.command()
def export(
    model: Annotated[
        list[str],
        typer.Argument(help="A folder, compressed or not, a hub id, an embedded model, or folders of adapters."),
    ],
    to: Annotated[str, typer.Option(help="dense, gguf or onnx; of an adapter lora, merged, absorbed or delta.")],
    out: Annotated[Path, typer.Option(help="New folder for the files.")],
    base: Annotated[str | None, typer.Option(help="The model that an adapter was made for.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="How much each of several adapters counts, such as 0.7,0.3.")
    ] = None,
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
    if (len(model) > 1 or weights is not None) and "base" not in fields:
        takes = " or ".join(
            key for key, each in registry(exporters).items() if "base" in each.__dataclass_fields__
        )
        raise ValueError(f"several adapters, and --weights, are for --to {takes}, not for --to {to}.")
    if "base" in fields and base is None:
        raise ValueError(f"--to {to} needs --base, the model that the adapter was made for.")
    words = [f"{name}={value}" for name, value in given.items() if value is not None]
    chosen = build(kind, [*words, *(settings or [])])
    source = model[0] if len(model) == 1 and weights is None else _weighted(model, weights)
    check_folder("--out", out)

    from .. import api

    say(f"exporting {' + '.join(model)} to {to}")
    api.export(source, chosen, out)
    for file in sorted(out.iterdir()):
        typer.echo(f"{file.stat().st_size / 1e6:10.1f} MB  {file}")


def _weighted(adapters: Sequence[str], weights: str | None) -> dict[str | Path, float]:
    """Give each adapter its weight."""
    words = (weights or "").split(",")
    if len(words) != len(adapters) or len(set(adapters)) < len(adapters):
        raise ValueError(
            f"--weights takes one number for each adapter, such as {','.join(['0.5'] * len(adapters))}, and each "
            f"adapter is given once; got {len(adapters)} adapters and {weights!r}."
        )
    try:
        return {adapter: float(word) for adapter, word in zip(adapters, words, strict=True)}
    except ValueError as error:
        raise ValueError(f"--weights takes numbers such as 0.7,0.3, got {weights!r}.") from error
