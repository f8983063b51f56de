"""What every verb returns: rows, totals, and three ways to show them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Report:
    """The result of a verb: one row for each thing it looked at, and totals over all of them.

    Args:
        title: one line for people; ``print`` shows it above the rows.
        rows: flat, JSON-ready mappings; all have the same keys.
        rows_name: what the rows are; their key in :meth:`to_dict`.
        totals: JSON-ready figures about the whole.
        curves: named series for plots only, such as the spectrum of each layer; not in the JSON.
    """

    title: str
    rows: Sequence[Row] = ()
    rows_name: str = "layers"
    totals: Mapping[str, Any] = field(default_factory=dict)
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Return totals and rows as one JSON-ready dictionary."""
        return {**self.totals, self.rows_name: [dict(row) for row in self.rows]}

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the report as JSON text and, with ``path``, write it there."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def table(self) -> str:
        """Return the rows as aligned text columns."""
        if not self.rows:
            return f"{self.title}\n(nothing)"
        keys = list(self.rows[0])
        cells = [keys, *[[_text(row[k]) for k in keys] for row in self.rows]]
        widths = [max(len(line[j]) for line in cells) for j in range(len(keys))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]
        return "\n".join([self.title, *lines])

    def to_html(self, path: str | Path | None = None) -> str:
        """Return the report as one self-contained HTML page and, with ``path``, write it there."""
        from .html import render

        text = render(self)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
