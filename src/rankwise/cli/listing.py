"""``rankwise list``."""

import dataclasses
import inspect
import re
from types import ModuleType
from typing import Any

import typer

from ..core.rates import GENERAL
from .app import app
from .options import describe, registry


@app.command("list")
def methods() -> None:
    """Print every method, allocator, measure and format, with the fields that --set takes."""
    from .. import (
        adapters,
        allocators,
        compressors,
        estimators,
        exporters,
        measures,
        optimizers,
        preconditioners,
    )

    sections: dict[str, ModuleType] = {
        "Methods (compress --method NAME --set field=value)": compressors,
        "Adapters (adapt --method NAME --set field=value)": adapters,
        "Allocators (compress --allocate NAME)": allocators,
        "Measures (inspect)": measures,
        "Optimisers (train --optimizer NAME --set field=value)": optimizers,
        "Estimators (rankwise.estimate in Python)": estimators,
        "Preconditioners (train --precondition NAME --precondition-set field=value)": preconditioners,
        "Formats (export --to NAME --set field=value)": exporters,
    }
    for title, package in sections.items():
        typer.echo(f"{title}\n")
        for name, entry in registry(package).items():
            typer.echo(f"  {name}: {_summary(entry)}")
            if package is optimizers or (isinstance(entry, type) and dataclasses.is_dataclass(entry)):
                for field in describe(entry):
                    typer.echo(f"      {field}")
            if package is adapters:
                typer.echo(f"      learning rate without --lr: {_rate(entry):g}")
        typer.echo("")


def _rate(adapter: Any) -> float:
    return GENERAL if adapter.lr is None else adapter.lr


def _summary(entry: Any) -> str:
    text = inspect.getdoc(entry) or ""
    return plain(" ".join(text.split("\n\n")[0].split()))


def plain(text: str) -> str:
    """Take the marks of the documentation out of a text.

    >>> plain("As :class:`Gptq`, or :func:`rankwise.adapt` with ``rank``.")
    'As Gptq, or rankwise.adapt with rank.'
    """
    return re.sub(r"(?::\w+:)?`+~?([^`]+)`+", r"\1", text)
