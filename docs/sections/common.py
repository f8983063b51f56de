"""Committed results, and tables of them."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def load(name: str) -> dict | None:
    """Read a result, or return None if it is not committed."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Return a Markdown table."""
    return ["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows]] + [""]


def find(rows: list[dict], **key: Any) -> dict | None:
    """Return the first row with these values."""
    return next((row for row in rows if all(row.get(k) == v for k, v in key.items())), None)


def find_all(rows: list[dict], **key: Any) -> list[dict]:
    """Return the rows with these values."""
    return [row for row in rows if all(row.get(k) == v for k, v in key.items())]


def head_of(title: str, found: dict) -> list[str]:
    """Return a title, the command that made a result, and where."""
    about = found["environment"]
    made = f"torch {about['torch']}, {about['threads']} threads, commit {about['commit']}"
    return [f"## {title}", "", f"`{found['command']}` ({made})", ""]
