"""Arguments that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A folder, a hub id, a .gguf file, or an embedded model.")]
Keep = Annotated[float, typer.Option(help="Size afterwards as a share of the size before, in (0, 1].")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="field=value of the method.")]
Data = Annotated[list[str] | None, typer.Option(help="self (the default), text files, topics or python.")]
CalibrationTokens = Annotated[
    int | None, typer.Option(help="Tokens to calibrate with, shared by all texts; default: 24576.")
]
Window = Annotated[int | None, typer.Option(help="Length of a calibration sequence; default: 512.")]
LabelKind = Annotated[str | None, typer.Option(help="Labels of the gradients: sampled or data.")]
Eval = Annotated[list[str] | None, typer.Option("--eval", help="NAME=FILE, topics or python.")]
MaxTokens = Annotated[
    int | None, typer.Option(help="Of --eval: use the last so many tokens of a text; default: 16384.")
]
EvalWindow = Annotated[int | None, typer.Option(help="Of --eval: length of a window; default: 1024.")]
WherePattern = Annotated[str | None, typer.Option(help="Regular expression on layer names.")]
Dtype = Annotated[str, typer.Option(help="auto, float32 or bfloat16.")]
Seed = Annotated[int | None, typer.Option(help="For sampled sequences and labels; default: 0.")]
Out = Annotated[Path | None, typer.Option(help="New folder for the smaller model.")]
Json = Annotated[Path | None, typer.Option(help="File for the figures.")]
Html = Annotated[Path | None, typer.Option(help="File for the report; default: report.html in --out.")]
