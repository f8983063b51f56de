"""Plots of a report as SVG text: sizes and figures of the layers by depth, and their spectra."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
Draw = Callable[["Axes"], None]

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rankwise",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e8ebf0",
    "axes.axisbelow": True,
    "axes.edgecolor": "#8a94a3",
    "lines.linewidth": 1.2,
}
_MOST_KINDS = 12


def figures(rows: Sequence[Row], curves: Mapping[str, Sequence[float]]) -> list[tuple[str, str]]:
    """Return the captions and SVG texts of the plots that the data of a report allow.

    Args:
        rows: of a report; plotted if they have a ``name`` and numbers that belong to layers.
        curves: the singular values of each layer, largest first.
    """
    from matplotlib import rc_context

    with rc_context(_STYLE):
        found = []
        if rows and "params_before" in rows[0]:
            found.append(("Size of each layer", _svg(_sizes(rows))))
        elif rows and "shape" in rows[0]:
            found.append(("Measures of each layer", _svg(_measures(rows))))
        if curves:
            found.append(
                ("Singular values, one line for each layer, dark to light with depth", _svg(_spectra(curves)))
            )
        return found


def by_kind(names: Sequence[str]) -> dict[str, list[str]]:
    """Group layer names by what they are called without their numbers, in order of depth.

    >>> by_kind(["h.0.mlp.up", "h.0.mlp.down", "h.1.mlp.up", "h.1.mlp.down"])
    {'up': ['h.0.mlp.up', 'h.1.mlp.up'], 'down': ['h.0.mlp.down', 'h.1.mlp.down']}
    """
    paths = {name: [part for part in name.split(".") if not part.isdigit()] for name in names}
    shared = 0
    while len({tuple(path[: shared + 1]) for path in paths.values()}) == 1 and all(
        len(path) > shared + 1 for path in paths.values()
    ):
        shared += 1
    kinds = {name: ".".join(path[shared:]) or "layers" for name, path in paths.items()}
    if len(set(kinds.values())) > _MOST_KINDS:
        kinds = {name: (path or ["layers"])[-1] for name, path in paths.items()}
    groups: dict[str, list[str]] = {}
    for name, kind in kinds.items():
        groups.setdefault(kind, []).append(name)
    return groups


def _sizes(rows: Sequence[Row]) -> "Figure":
    kept = {row["name"]: row["params_after"] / row["params_before"] for row in rows}
    ranks = {row["name"]: row.get("rank") for row in rows}
    panels = {"parameters, after / before": _map(kept, most=1.0), "rank": _map(ranks)}
    return _panels(panels, columns=2, legend=False)


def _measures(rows: Sequence[Row]) -> "Figure":
    keys = [key for key in rows[0] if key not in {"name", "shape", "params", "kind"}]
    named = {
        key: {row["name"]: row[key] for row in rows}
        for key in keys
        if any(isinstance(row[key], int | float) for row in rows)
    }
    panels = {key.replace("_", " "): _lines(values) for key, values in named.items()}
    return _panels(panels, columns=3, legend=True)


def _spectra(curves: Mapping[str, Sequence[float]]) -> "Figure":
    groups = by_kind(list(curves))
    panels = {kind: _spectrum([curves[name] for name in names]) for kind, names in groups.items()}
    return _panels(panels, columns=4, legend=False)


def _map(values: Mapping[str, float | None], most: float | None = None) -> Draw:
    """Draw one row for each kind of layer and one column for each depth; an absent value is blank."""
    groups = by_kind(list(values))
    depth = max(map(len, groups.values()))

    def draw(axes: "Axes") -> None:
        lines = [[_number(values[name]) for name in names] for names in groups.values()]
        square = [line + [math.nan] * (depth - len(line)) for line in lines]
        mesh = axes.pcolormesh(square, cmap="viridis", vmin=0, vmax=most, edgecolors="white", linewidth=0.4)
        axes.set_yticks([i + 0.5 for i in range(len(groups))], list(groups))
        shown = range(0, depth, math.ceil(depth / 8))
        axes.set_xticks([i + 0.5 for i in shown], list(map(str, shown)))
        axes.invert_yaxis()
        axes.set_xlabel("depth")
        axes.grid(visible=False)
        bar: Any = axes.figure.colorbar(mesh, ax=axes, pad=0.02)
        bar.solids.set_rasterized(False)
        bar.solids.set_edgecolor("face")

    return draw


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _lines(values: Mapping[str, float | None]) -> Draw:
    """Draw one line for each kind of layer over depth; an absent value is a gap."""
    from matplotlib.ticker import MaxNLocator

    def draw(axes: "Axes") -> None:
        for kind, names in by_kind(list(values)).items():
            line = [_number(values[name]) for name in names]
            axes.plot(range(len(line)), line, marker="o", markersize=2.5, label=kind)
        axes.set_xlabel("depth")
        axes.set_ylim(0, 1.06 * max((v for v in values.values() if v is not None), default=1.0) or 1.0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return draw


def _spectrum(lines: Sequence[Sequence[float]]) -> Draw:
    """Draw singular values over their index on a logarithmic scale."""
    from matplotlib import colormaps
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    positive = [[value if value > 0 else math.nan for value in line] for line in lines]
    seen = [value for line in positive for value in line if value > 0]
    narrow = not seen or max(seen) < 50 * min(seen)

    def draw(axes: "Axes") -> None:
        colours = colormaps["viridis"]
        for depth, line in enumerate(positive):
            axes.plot(_thin(line), color=colours(0.9 * depth / max(len(lines) - 1, 1)), linewidth=0.8)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks([])

    return draw


def _thin(line: Sequence[float], most: int = 150) -> list[float]:
    """Keep at most ``most`` evenly spaced points, both ends among them."""
    if len(line) <= most:
        return list(line)
    return [line[round(i * (len(line) - 1) / (most - 1))] for i in range(most)]


def _panels(panels: Mapping[str, Draw], *, columns: int, legend: bool) -> "Figure":
    from matplotlib.figure import Figure

    across = min(columns, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(10, 2.6 * down if across > 2 else 3.2 * down), layout="constrained")
    for i, (title, draw) in enumerate(panels.items()):
        axes = figure.add_subplot(down, across, i + 1)
        axes.set_title(title, fontsize=9.5, loc="left", fontweight="bold")
        draw(axes)
    if legend:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        if 1 < len(labels) <= _MOST_KINDS:
            figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False)
    return figure


def _svg(figure: "Figure") -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
