"""``rankwise quickstart``."""

from pathlib import Path
from typing import Annotated

import typer

from .app import app


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for the models, the report and reusable results.")] = Path(
        "rankwise-quickstart"
    ),
    smoke: Annotated[
        bool, typer.Option("--smoke", help="One model and far fewer tokens: shows that everything runs.")
    ] = False,
) -> None:
    """Inspect, compress, evaluate, save and reload a real language model of 135M parameters."""
    from rich.console import Console
    from rich.table import Table

    from ..quickstart import quickstart as run

    report = run(out, smoke=smoke)
    rows = report.totals["models"]
    table = Table("model", title=report.title)
    for key in next(iter(rows.values())):
        table.add_column(
            "MB" if key == "file_bytes" else key.replace("_per_s", "/s").replace("_", " "), justify="right"
        )
    for name, row in rows.items():
        cells = (f"{v / 1e6:,.0f}" if k == "file_bytes" else f"{v:,.2f}" for k, v in row.items())
        table.add_row(name, *cells)
    Console().print(table)
