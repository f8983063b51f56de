"""One self-contained HTML page for a report: tables and inline SVG, no script, nothing fetched."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from .plots import figures
from .report import Report

_SIZES = ("bytes", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class _Group:
    """One small table of totals: a line for each key, with one value or one for each head."""

    name: str
    head: tuple[str, ...]
    lines: list[tuple[str, list[Any]]]


def render(report: Report) -> str:
    """Return a report as one HTML page that needs no other file.

    >>> "<h1>Layers of a &lt;b&gt;</h1>" in render(Report("Layers of a <b>"))
    True
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rankwise", "core"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"show": _show, "align": _align, "label": _label}
    return environment.get_template("report.html.jinja").render(
        title=report.title,
        groups=_groups(report.totals),
        figures=[(caption, Markup(svg)) for caption, svg in figures(report.rows, report.curves)],
        rows=report.rows,
        rows_name=_label(report.rows_name),
        version=version("rankwise"),
    )


def _groups(totals: Mapping[str, Any]) -> list[_Group]:
    """Split totals into tables: one for each mapping, and one for all single values."""
    single: dict[str, Any] = {}
    groups = []
    for key, value in totals.items():
        if not isinstance(value, Mapping):
            single[key] = value
        elif value and all(isinstance(inner, Mapping) for inner in value.values()):
            head = tuple(dict.fromkeys(name for inner in value.values() for name in inner))
            lines = [
                (str(name), [_bytes(inner.get(h)) if "bytes" in h else inner.get(h) for h in head])
                for name, inner in value.items()
            ]
            groups.append(_Group(_label(key), tuple(map(_label, head)), lines))
        elif value:
            groups.append(_table(key, value))
    return groups + ([_table("totals", single)] if single else [])


def _table(name: str, values: Mapping[str, Any]) -> _Group:
    unit = "bytes" in name
    lines = [(_label(key), [_bytes(v) if unit or "bytes" in key else v]) for key, v in values.items()]
    return _Group(_label(name), (), lines)


def _bytes(count: Any) -> Any:
    """Write a number of bytes for people; leave anything else, such as a share, as it is."""
    if not isinstance(count, int):
        return count
    size, unit = float(count), 0
    while size >= 1000 and unit < len(_SIZES) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.4g} {_SIZES[unit]}"


def _label(key: str) -> str:
    return key.replace("_", " ")


def _show(value: Any) -> str:
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " \N{MULTIPLICATION SIGN} ".join(map(_show, value))
    return str(value)


def _align(value: Any) -> str:
    return "text" if isinstance(value, str) and len(value) > 40 else "" if isinstance(value, str) else "number"
