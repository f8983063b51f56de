"""``rankwise adapt``."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from ..core.methods import BlockAdapter, check_seed
from ..core.report import Report
from .app import app, say
from .arguments import Dtype, Json, Model, Settings, WherePattern
from .files import check_files, check_folder, write_report
from .options import at_least, build, check_matches, layer_names, only_with, pick, registry, where_option
from .several import alone
from .work import DTYPES, in_words, partial_folder, stopped

ASIDE = 0.1  # share of the examples that judges where there is no --eval


@app.command()
@alone
def adapt(
    model: Model,
    data: Annotated[Path, typer.Option(help="A text, or .jsonl; see above for its fields.")],
    method: Annotated[str, typer.Option(help="See `rankwise list`.")] = "eva",
    rank: Annotated[int | None, typer.Option(help="The method's rank; short for --set rank=...")] = None,
    settings: Settings = None,
    where: WherePattern = None,
    also: Annotated[str | None, typer.Option(help="Regular expression on parameters that train whole.")] = None,
    eval_: Annotated[Path | None, typer.Option("--eval", help="Judge by this, not by a tenth of --data.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps; default: --epochs over the data.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data; default: 1.")] = None,
    lr: Annotated[
        float | None, typer.Option(help="Largest learning rate of AdamW; default: the method's.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Windows, or texts of a classifier, at a time.")] = 4,
    accumulate: Annotated[int, typer.Option(help="Batches of a step.")] = 1,
    window: Annotated[int, typer.Option(help="Most tokens of a sequence.")] = 512,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient.")] = 1.0,
    every: Annotated[
        int | None, typer.Option(help="Steps between evaluations; default: ten in all, or fewer.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many evaluations without a better one.")
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help="Tokens that methods with statistics read; default: 24576.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Of all random numbers.")] = 0,
    out: Annotated[Path | None, typer.Option(help="New folder for the adapter.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the same, stopped command.")] = False,
    json: Json = None,
    html: Annotated[Path | None, typer.Option(help="File for the report.")] = None,
) -> None:
    """Train few numbers beside the frozen weights of a causal language model, or of a classifier.

    Lines of a .jsonl file are {"text"}, {"prompt", "completion"} or {"question", "answer"} with the loss on the
    second part, {"messages"} with the loss on what the assistant says, or {"text", "label"} for a classifier,
    whose head trains whole. A model in half precision runs under autocast.

    Checkpoints lie in the folder OUT.partial until OUT is complete.
    """
    for flag, count in (("--steps", steps), ("--batch", batch), ("--accumulate", accumulate), ("--every", every)):
        at_least(flag, count, 1)
    at_least("--window", window, 2)
    at_least("--patience", patience, 1)
    at_least("--calibration-tokens", calibration_tokens, 1)
    check_seed("--seed", seed)
    for flag, value in (("--lr", lr), ("--clip", clip), ("--epochs", epochs)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{flag} must be a positive number, got {value}.")
    if steps is not None and epochs is not None:
        raise ValueError("--steps and --epochs both say how long to train; give one of them.")
    from .. import adapters

    words = [*(settings or []), *([] if rank is None else [f"rank={rank}"])]
    chosen = build(pick("--method", method, registry(adapters)), words)
    layers, beside = where_option(where), where_option(also, "--also")
    reader = f"a method that reads statistics, unlike {method}"
    needs = getattr(chosen, "needs", ())  # what stands between layers reads none
    only_with(reader, bool(needs), {"--calibration-tokens": calibration_tokens})
    precision = pick("--dtype", dtype, DTYPES)
    check_folder("--out", out)
    check_files(json, html, out)
    state = partial_folder(out, resume)

    say(f"loading {model}")
    shape = Shape(window, batch, calibration_tokens or 24576, seed)
    task = _task(model, precision, data, eval_, shape)
    network = task.network
    check_matches("--where", where, layer_names(network))
    check_matches("--also", also, [name for name, _ in network.named_parameters()])

    from .. import adapting, finetuning
    from ..models import save

    def adapted(name: str, module: nn.Module) -> bool:
        assert layers is not None
        return layers(name, module) and f"{name}.weight" not in task.whole

    def also_trained(name: str) -> bool:
        return name in task.whole or (beside is not None and beside(name, network))

    say(f"adapting with {method}")
    made = adapting.adapt(
        network,
        chosen,
        where=None if layers is None else adapted,
        data=None if isinstance(chosen, BlockAdapter) else task.calibration,
        also=also_trained if task.whole or beside is not None else None,
        seed=seed,
    )
    typer.echo(made.table())
    share = made.totals["trained"] / made.totals["params"]
    say(f"{made.totals['trained']:,} of {made.totals['params']:,} parameters train ({share:.2%})")
    before = task.figures(network)
    try:
        trained = finetuning.finetune(
            network,
            task.train,
            held_out=task.judges,
            lr=lr,
            steps=steps or max(1, round((epochs or 1.0) * len(task.train) / accumulate)),
            accumulate=accumulate,
            clip=clip,
            every=every,
            patience=patience,
            autocast=torch.bfloat16 if network.dtype in (torch.bfloat16, torch.float16) else None,
            gradient_checkpointing=gradient_checkpointing,
            checkpoint=state,
            notify=lambda memory: say(f"predicted   {in_words(memory)}"),
            seed=seed,
        )
    except KeyboardInterrupt:
        if stopped(state):
            say(f"stopped; the last checkpoint is in {state}, and the same command with --resume goes on from it")
        raise
    measured = {name: trained.totals["memory"][name] for name in ("rise", "peak")}
    say(f"measured    {in_words(measured)} of the whole process")
    if trained.totals["adapters"] is not None:
        say(f"checked     {trained.totals['adapters']['title']}")
    after = task.figures(network)
    if out is not None:
        say(f"saving to {out}")
        save(network, out, format="rankwise")
        if state is not None:
            shutil.rmtree(state, ignore_errors=True)
    figures = {name: {"before": before[name], "after": after[name]} for name in before}
    totals = {**made.totals, **figures, "training": trained.to_dict()}
    report = Report(f"{model}, {made.title}; {trained.title}", made.rows, "layers", totals)
    write_report(report, json, html)
    typer.echo(report.title)
    for name, each in figures.items():
        typer.echo(f"{name:<12}{each['before']:.4f} -> {each['after']:.4f}")


@dataclass(frozen=True)
class Shape:
    """Sizes of batches.

    Args:
        window: most tokens of a sequence.
        batch: sequences of a batch.
        calibration: tokens that statistics read.
        seed: of the order of the examples.
    """

    window: int
    batch: int
    calibration: int
    seed: int


@dataclass(frozen=True)
class Task:
    """A model, and what it is to learn.

    Args:
        network: the model.
        train: batches to learn.
        judges: batches to judge by.
        calibration: batches without labels, for statistics.
        whole: names of parameters that train whole: a classifier's head.
    """

    network: Any
    train: Sequence[dict[str, Any]]
    judges: Sequence[dict[str, Any]]
    calibration: Sequence[dict[str, Any]]
    whole: frozenset[str] = frozenset()

    def figures(self, network: Any) -> dict[str, float]:
        """Measure what people want to know beside the loss."""
        from ..models.classifier import accuracy

        return {"accuracy": accuracy(network, self.judges)} if self.whole else {}


def _task(source: str, dtype: torch.dtype | None, data: Path, other: Path | None, shape: Shape) -> Task:
    """Load the model that the data asks for, and cut the data into batches."""
    from ..models.examples import has_labels

    return (_classes if has_labels(data) else _texts)(source, dtype, data, other, shape)


def _texts(source: str, dtype: torch.dtype | None, data: Path, other: Path | None, shape: Shape) -> Task:
    from .. import models
    from ..models.causal import check_causal
    from ..models.examples import kept_aside, read_examples
    from ..models.packing import keeps_apart, packed, unlabelled

    network, tokenizer = models.load(source, dtype=dtype)
    if tokenizer is None:
        raise ValueError(f"{source} has no tokenizer.")
    check_causal(network, shape.window, 'only such models learn texts; give a model or lines with a "label"')
    learned = read_examples(data, tokenizer)
    if other is None:
        learned, held = kept_aside(learned, ASIDE, shape.seed, str(data))
    else:
        held = read_examples(other, tokenizer)
    together = keeps_apart(network)
    if not together:
        say(f"{type(network).__name__} lets texts of one window see each other, so each gets a window of its own")
    sizes: dict[str, Any] = {"seed": shape.seed, "alone": not together}
    train = packed(learned, shape.window, rows=shape.batch, name=str(data), **sizes)
    judges = packed(held, shape.window, rows=shape.batch, name=str(other or data), **sizes)
    single = packed(learned, shape.window, rows=1, name=str(data), **sizes)
    return Task(network, train, judges, unlabelled(single, shape.calibration))


def _classes(source: str, dtype: torch.dtype | None, data: Path, other: Path | None, shape: Shape) -> Task:
    from ..models.classifier import is_head, labelled_batches, load_classifier
    from ..models.examples import in_order, kept_aside, read_labelled
    from ..models.packing import unlabelled

    learned = read_labelled(data)
    labels = in_order(label for _, label in learned)
    if len(labels) < 2:
        raise ValueError(f"{data} has one label only, {labels[0]!r}; a classifier needs two or more.")
    if other is None:
        learned, held = kept_aside(learned, ASIDE, shape.seed, str(data))
    else:
        held = read_labelled(other)
    network, tokenizer = load_classifier(source, labels, dtype=dtype, seed=shape.seed)
    sizes: dict[str, Any] = {"window": shape.window, "rows": shape.batch, "seed": shape.seed}
    train = labelled_batches(learned, network, tokenizer, **sizes)
    judges = labelled_batches(held, network, tokenizer, **sizes)
    whole = frozenset(name for name, _ in network.named_parameters() if is_head(network, name))
    return Task(network, train, judges, unlabelled(train, shape.calibration), whole)
