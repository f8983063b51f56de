"""``rankwise plan``."""

import shlex
from typing import Annotated

import torch
import typer

from .app import app
from .arguments import Json
from .files import check_file, write_report
from .options import at_least, pick
from .work import DTYPES

MIB = 2**20


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A model, a config.json, llama-7b, or llama:hidden=256.")],
    memory: Annotated[str, typer.Option(help="How much there is: 16GiB.")],
    batch: Annotated[int, typer.Option(help="Sequences at a time that are wanted.")] = 8,
    window: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 1024,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32 or bfloat16.")] = "bfloat16",
    autocast: Annotated[bool, typer.Option("--autocast", help="Run the model in bfloat16.")] = False,
    json: Json = None,
) -> None:
    """Say which optimiser, batch and savings let all numbers of a language model be trained in so much memory.

    Nothing is loaded or made: sizes are counted from shapes. What is best to try comes first; sizes are in GiB,
    and a tenth of the memory stays free.
    """
    from ..exporters.adapted import bytes_of
    from ..planning import plan as planned

    at_least("--batch", batch, 1)
    at_least("--window", window, 2)
    size = bytes_of(memory) or 0
    if size < MIB:
        better = f"{memory}GiB" if memory.isdigit() else "16GiB"
        raise ValueError(f"--memory {memory} is less than a MiB; write the unit, such as --memory {better}.")
    precision = pick("--dtype", dtype, {name: kind for name, kind in DTYPES.items() if kind is not None})
    check_file("--json", json)
    report = planned(
        model,
        size,
        batch=batch,
        window=window,
        dtype=precision,
        autocast=torch.bfloat16 if autocast else None,
    )
    write_report(report, json, None)
    typer.echo(report.table())
    best = report.rows[0]
    if best["fits"]:
        flags = [
            "--layerwise" * best["layerwise"],
            "--gradient-checkpointing" * best["checkpointing"],
            "--autocast" * autocast,
        ]
        words = [
            f"--optimizer {best['optimizer']}",
            f"--batch {min(batch, best['batch'])}",
            f"--window {window}",
            *flags,
        ]
        typer.echo(
            f"rankwise train {shlex.quote(model)} --dtype {dtype} {' '.join(filter(None, words))} --data ..."
        )
