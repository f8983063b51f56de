"""``rankwise evaluate``."""

from pathlib import Path
from typing import Annotated

import typer

from .app import app, say
from .compress import DTYPES
from .files import check_files, named_texts, write_report
from .options import at_least, pick


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A folder, a hub id, a .gguf file, or an embedded model.")],
    text: Annotated[list[str], typer.Option(help="NAME=FILE, topics or python.")],
    window: Annotated[int, typer.Option(help="Length of a window.")] = 1024,
    max_tokens: Annotated[int | None, typer.Option(help="Use the last so many tokens of a text.")] = None,
    dense: Annotated[
        str | None, typer.Option(help="Another model, to which the KL divergence is measured.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
    html: Annotated[Path | None, typer.Option(help="File for the report.")] = None,
) -> None:
    """Measure the perplexity of a model on texts."""
    at_least("--window", window, 2)
    at_least("--max-tokens", max_tokens, 2)
    precision = pick("--dtype", dtype, DTYPES)
    check_files(json, html)
    texts = named_texts("--text", text)

    from .. import models

    say(f"loading {model}")
    network, tokenizer = models.load(model, dtype=precision)
    other = None
    if dense is not None:
        say(f"loading {dense}")
        other, _ = models.load(dense, dtype=precision)
    contents = {text.name: text.content for text in texts}
    say(f"evaluating on {', '.join(contents)}")
    report = models.evaluate(network, tokenizer, contents, window=window, dense=other, max_tokens=max_tokens)
    write_report(report, json, html)
    typer.echo(report.table())
