"""Write docs/methods.md from the docstrings and fields of everything that the method packages export.

Usage: python docs/methods.py
"""

import dataclasses
import inspect
import re
import types
from collections.abc import Iterator
from pathlib import Path

from rankwise import (
    adapters,
    allocators,
    compressors,
    estimators,
    exporters,
    initialisers,
    layers,
    matrices,
    measures,
    optimizers,
    preconditioners,
    projectors,
    rank_rules,
    schedules,
    starts,
)
from rankwise.cli.options import command_name
from rankwise.optimizers import retractions

TARGET = Path(__file__).with_name("methods.md")
SECTIONS: dict[str, tuple[types.ModuleType, str]] = {
    "Compressors": (
        compressors,
        "`rankwise.compress(model, method, ...)` and `rankwise compress --method NAME`.",
    ),
    "Allocators": (
        allocators,
        "`rankwise.compress(..., allocate=...)` and `rankwise compress --allocate NAME`.",
    ),
    "Adapters": (adapters, "`rankwise.adapt(model, method, ...)` and `rankwise adapt --method NAME`."),
    "Initialisers": (initialisers, "`Lora(start=...)` and `rankwise adapt --method lora --set start=NAME`."),
    "Rank rules": (
        rank_rules,
        "`ranks=...` of adapters that have it and `rankwise adapt --method lora --set ranks=NAME`.",
    ),
    "Schedules": (schedules, "What adapters that change while they train hold; `rankwise.follow` lets them act."),
    "Starts": (starts, "`rankwise.initialise(model, start)`."),
    "Measures": (measures, "`rankwise.inspect(model)` and `rankwise inspect`."),
    "Optimisers": (
        optimizers,
        "`rankwise.Optimizer([(model.parameters(), NAME(...))], lr=...)`; each call returns a transform.",
    ),
    "Preconditioners": (
        preconditioners,
        "`rankwise.precondition(model, method)` and `rankwise train --precondition NAME`.",
    ),
    "Retractions": (
        retractions,
        "How `stiefel(retraction=...)` comes back to orthogonal matrices.",
    ),
    "Projectors": (
        projectors,
        "What projected optimisers hold: subspaces, when they are chosen again, what becomes of moments in them.",
    ),
    "Estimators": (
        estimators,
        "`rankwise.estimate(model, estimator, ...)`: gradients without back-propagation, for any optimiser.",
    ),
    "Layers": (layers, "What `rankwise.lipschitz_bound(model)` understands beside the layers of torch."),
    "Formats": (
        exporters,
        "`rankwise.export(model, format, folder)` and `rankwise export --to NAME`.",
    ),
    "Matrices": (matrices, "What a compressed layer holds, and what a saved model may contain."),
}


def page() -> str:
    """Return the text of docs/methods.md."""
    blocks = ["# Methods", "Made by `docs/methods.py` from the docstrings; change those instead."]
    for title, (package, use) in SECTIONS.items():
        blocks += [f"## {title}", use]
        for name in package.__all__:
            blocks += entry(name, getattr(package, name), package)
    return "\n\n".join(blocks) + "\n"


def default_of(field: dataclasses.Field) -> str:
    """Return what stands for a field that is not given."""
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    if inspect.isfunction(field.default):
        return field.default.__name__
    return "" if field.default is dataclasses.MISSING else repr(field.default)


def entry(name: str, value: object, package: types.ModuleType) -> Iterator[str]:
    """Yield the paragraphs about one exported name."""
    yield f"### {name}"
    if package in (compressors, allocators, adapters, initialisers, rank_rules, exporters, preconditioners):
        yield f"On the command line: `{command_name(name)}`."
    yield from paragraphs(inspect.getdoc(value) or "")
    if inspect.isclass(value) and dataclasses.is_dataclass(value) and dataclasses.fields(value):
        rows = [f"| `{f.name}` | `{type_name(f.type)}` | `{default_of(f)}` |" for f in dataclasses.fields(value)]
        yield "\n".join(["| field | type | default |", "|---|---|---|", *rows])
    if package is optimizers and inspect.isfunction(value):
        given = [f"| `{p.name}` | `{type_name(p.annotation)}` | {given_as(p)} |" for p in parameters(value)]
        yield "\n".join(["| argument | type | default |", "|---|---|---|", *given]) if given else "No arguments."


def parameters(function: types.FunctionType) -> list[inspect.Parameter]:
    """Return the arguments of a function."""
    return list(inspect.signature(function).parameters.values())


def given_as(parameter: inspect.Parameter) -> str:
    """Return the default of an argument as code, or nothing."""
    return "" if parameter.default is inspect.Parameter.empty else f"`{parameter.default!r}`"


def paragraphs(doc: str) -> Iterator[str]:
    """Yield a Google-style docstring as Markdown paragraphs."""
    for block in re.split(r"\n\s*\n", doc):
        first, _, rest = block.partition("\n")
        if block.startswith(">>>"):
            yield f"```python\n{block}\n```"
        elif first in ("Args:", "Raises:", "Returns:"):
            items = re.split(r"\n {4}(?=\S)", "\n" + rest)[1:]
            yield "\n".join([first, "", *[f"- {plain(item)}" for item in items]])
        else:
            yield plain(block)


def plain(text: str) -> str:
    """Join lines, and turn cross-references into code."""
    joined = " ".join(text.split())
    return re.sub(r"``(.+?)``", r"`\1`", re.sub(r":\w+:`~?(.+?)`", r"`\1`", joined))


def type_name(kind: object) -> str:
    """Show a field's type as it is written, in a cell of a table."""
    shown = kind.__name__ if isinstance(kind, type) else re.sub(r"\b[A-Za-z_]+\.(?=\w)", "", str(kind))
    return shown.replace("|", "\\|")


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
