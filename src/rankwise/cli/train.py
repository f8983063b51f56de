"""``rankwise train``."""

import contextlib
import shutil
from collections.abc import Sequence
from inspect import Parameter
from json import loads
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor

from ..core.checkpoint import load_tree
from ..core.data import batches_of
from ..core.methods import check_seed
from ..core.preconditioner import Preconditioner
from ..core.processes import leads
from ..core.rates import Cosine
from ..core.report import Report
from ..core.supervision import CHECKPOINT
from ..core.tensorboard import tensorboard
from ..core.transforms import Transform
from .app import app, say
from .arguments import Json, Settings
from .files import check_files, check_folder, texts_of, write_report
from .options import at_least, build, parse, pick, registry, settable
from .several import first_first, launched
from .work import DTYPES, TOKENIZER, in_words, partial_folder, stopped

SHARE = 0.25  # rank of optimisers that suggest none: that of most of GaLore's experiments
Files = Annotated[list[str], typer.Option("--data", help="Texts, also .gz, .xz and .jsonl; topics or python.")]
Judges = Annotated[list[str] | None, typer.Option("--eval", help="Judge by these, not by a part of --data.")]


@app.command()
@launched
def train(
    model: Annotated[str, typer.Argument(help="A model, a config.json, llama-60m, or llama:hidden=256.")],
    data: Files,
    optimizer: Annotated[str, typer.Option(help="Of hidden matrices; see `rankwise list`.")] = "galore",
    rank: Annotated[
        int | None,
        typer.Option(
            help="The optimiser's rank; short for --set rank=...; default: its own, or a quarter of each side."
        ),
    ] = None,
    settings: Settings = None,
    precondition: Annotated[
        str | None, typer.Option(help="Make natural gradients first; see `rankwise list`.")
    ] = None,
    precondition_settings: Annotated[
        list[str] | None, typer.Option("--precondition-set", help="field=value of the preconditioner.")
    ] = None,
    lr: Annotated[float, typer.Option(help="Largest learning rate of matrices.")] = 1e-3,
    other_lr: Annotated[float | None, typer.Option(help="That of Adam on all else; default: --lr.")] = None,
    weight_decay: Annotated[float, typer.Option(help="Of matrices, embeddings and heads.")] = 0.0,
    steps: Annotated[int | None, typer.Option(help="Steps; default: one pass over the data.")] = None,
    warmup: Annotated[float, typer.Option(help="Share of the steps before the cosine falls.")] = 0.1,
    batch: Annotated[int, typer.Option(help="Windows at a time.")] = 4,
    accumulate: Annotated[int, typer.Option(help="Batches of a step.")] = 1,
    window: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    clip: Annotated[
        float | None,
        typer.Option(
            help="Largest gradient norm; default: as before --resume; 1, or none with --layerwise or processes."
        ),
    ] = None,
    every: Annotated[
        int | None, typer.Option(help="Steps between evaluations; default: ten in all, or fewer.")
    ] = None,
    eval_: Judges = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, float32 or bfloat16.")] = "auto",
    autocast: Annotated[bool, typer.Option("--autocast", help="Run the model in bfloat16.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    layerwise: Annotated[
        bool, typer.Option("--layerwise", help="Step each matrix in the backward pass and free its gradient.")
    ] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="bytes, pairs (trained on --data), or a model whose it is.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of all random numbers.")] = 0,
    out: Annotated[Path | None, typer.Option(help="New folder for the model.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the same, stopped command.")] = False,
    logs: Annotated[Path | None, typer.Option("--tensorboard", help="Folder for TensorBoard.")] = None,
    json: Json = None,
    html: Annotated[Path | None, typer.Option(help="File for the report.")] = None,
) -> None:
    """Train all numbers of a causal language model on texts, from scratch or further, with little memory.

    A config, a preset or words make a new model; anything else is loaded and goes on. A new model without a
    tokenizer gets one of byte pairs trained on the data, or of bytes where its vocabulary is too small for that;
    words that do not name a vocabulary get bytes.

    Attention and MLP matrices get --optimizer; embeddings, the head, norms and biases get Adam. Texts are put one
    after the other and cut into windows. Checkpoints lie in the folder OUT.partial until OUT is complete.

    Started by torchrun or accelerate, each process computes a share of the --accumulate batches of a step, and
    they exchange projected gradients, or whole ones with --clip or --precondition. The steps are those of one
    process.

    With --precondition gradients of linear layers become natural gradients, by a method such as sngd, before they
    are clipped and --optimizer sees them. A sample is a window, and its tokens are positions: with sharing=exact
    (--precondition-set) there are as many samples as windows in a step; with expanded each token is one, which
    costs and knows more. Damping (--precondition-set damping=...) is in units of squared gradients of the losses
    of tokens, whatever the window. The report says how long each phase took.
    """
    for flag, count in (("--steps", steps), ("--batch", batch), ("--accumulate", accumulate), ("--every", every)):
        at_least(flag, count, 1)
    at_least("--window", window, 2)
    check_seed("--seed", seed)
    for flag, value in (("--lr", lr), ("--other-lr", other_lr), ("--clip", clip)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{flag} must be a positive number, got {value}.")
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"--weight-decay must be a number >= 0, got {weight_decay}.")
    from .. import optimizers

    words = [*(settings or []), *([] if rank is None else [f"rank={rank}"])]
    recipe = pick("--optimizer", optimizer, registry(optimizers))
    if rank is not None and not any(each.name == "rank" for each in settable(recipe)):
        raise ValueError(f"--rank: {optimizer} has no rank; leave it out, or take a projection such as galore.")
    lacks = any(each.name == "rank" and each.default is Parameter.empty for each in settable(recipe))
    if lacks and not any(word.startswith("rank=") for word in words):
        say(f"{optimizer} gets rank={SHARE}, a share of the shorter side of each matrix; --rank gives another")
        words.append(f"rank={SHARE}")
    transform = build(recipe, words)
    conditioner = _conditioner(precondition, precondition_settings, layerwise)
    rate = Cosine(warmup)
    precision = pick("--dtype", dtype, DTYPES)
    if dist.is_initialized() and accumulate % dist.get_world_size():
        say(f"--accumulate {accumulate} is no multiple of the {dist.get_world_size()} processes: some will wait")
    place = torch.device(pick("--device", device, _devices()))
    if not leads():
        json = html = logs = None
    with first_first():
        check_folder("--out", out)
        check_files(json, html, out)
        state = partial_folder(out, resume or (out is not None and not leads()))
        say(f"loading {model}")
        network, words_of = _model(model, tokenizer, data, precision, seed, state)
    from .. import models, pretraining
    from ..core.hidden import hidden_matrices
    from ..core.optimizer import Optimizer
    from ..core.writing import usual_write
    from ..models.causal import check_causal
    from ..preconditioning import precondition as conditioned

    check_causal(network, window, "only such models learn texts")
    network.to(place)
    write = usual_write(network.dtype, seed)
    if network.dtype == torch.bfloat16:
        say("steps are rounded to torch.bfloat16 at random, so that small ones count on average")
    ids = _ids("--data", data, words_of)
    judges: Any = 0.05
    if eval_:
        judges = batches_of(_ids("--eval", eval_, words_of), window=window, tokens=batch * window)
    named = next((word.partition("=")[2] for word in words if word.startswith("other=")), "adam")
    other = optimizers.adam() if named == "adam" else parse(Transform, named)
    groups = pretraining.parameter_groups(
        network, transform, other=other, lr=lr, other_lr=other_lr, weight_decay=weight_decay
    )
    inside, numbers = hidden_matrices(network), [0, 0]
    for name, p in (pair for group in groups for pair in group["params"]):
        numbers[name not in inside] += p.numel()
    say(f"{numbers[0]:,} numbers in matrices get {optimizer}, {numbers[1]:,} others {named}")
    handle = None if conditioner is None else conditioned(network, conditioner, seed=seed)
    with contextlib.nullcontext() if logs is None else tensorboard(logs) as observe:
        try:
            report = pretraining.train(
                network,
                ids,
                Optimizer(groups, lr=lr, write=write),
                held_out=judges,
                steps=steps,
                accumulate=accumulate,
                rate=rate,
                clip=_clip(clip, None if layerwise or dist.is_initialized() else 1.0, state),
                every=every,
                autocast=torch.bfloat16 if autocast else None,
                gradient_checkpointing=gradient_checkpointing,
                layerwise=layerwise,
                precondition=handle,
                checkpoint=state,
                notify=lambda memory: say(f"predicted   {in_words(memory)}"),
                observe=observe,
                window=window,
                rows=batch,
                seed=seed,
            )
        except KeyboardInterrupt:
            if stopped(state):
                say(f"stopped; the checkpoint is in {state}, and the same command with --resume goes on from it")
            raise
    if not leads():
        return
    measured = {name: report.totals["memory"][name] for name in ("rise", "peak")}
    say(f"measured    {in_words(measured)} of the whole process")
    if handle is not None:
        phases = ", ".join(f"{name} {found['seconds']:.2f} s" for name, found in handle.traffic().items())
        say(f"preconditioned {handle.steps} steps, passed over {handle.skipped}: {phases}")
        handle.remove()
    if out is not None:
        say(f"saving to {out}")
        models.save(network, out, words_of)
    if state is not None:
        shutil.rmtree(state, ignore_errors=True)
    report = Report(f"{model}, {optimizer}: {report.title}", report.rows, "looks", report.totals)
    write_report(report, json, html)
    typer.echo(report.table())


def _clip(given: float | None, usual: float | None, state: Path | None) -> float | None:
    """Return the largest norm of gradients: as it is said, or was in the run that goes on, or is usual."""
    file = None if state is None else state / CHECKPOINT
    if given is not None:
        return given
    if file is None or not file.exists():
        return usual
    return loads(load_tree(file, tensors=False)["identity"])["clip"]


def _conditioner(name: str | None, settings: list[str] | None, layerwise: bool) -> Preconditioner | None:
    """Make the preconditioner that the words ask for."""
    from .. import preconditioners

    if name is None:
        if settings:
            raise ValueError(f"--precondition-set needs --precondition, got {settings[0]!r}.")
        return None
    if layerwise:
        raise ValueError("--layerwise frees gradients before --precondition can see all of them; leave one out.")
    kinds = {
        name: kind
        for name, kind in registry(preconditioners).items()
        if isinstance(kind, type) and issubclass(kind, Preconditioner)
    }
    return build(pick("--precondition", name, kinds), settings or [], "--precondition-set")


def _devices() -> dict[str, str]:
    best = "cuda" if torch.cuda.is_available() else "cpu"
    return {"auto": best, "cpu": "cpu", **({"cuda": "cuda"} if best == "cuda" else {})}


def _model(
    source: str, words: str | None, data: Sequence[str], dtype: torch.dtype | None, seed: int, state: Path | None
) -> tuple[Any, Any]:
    """Load a model or make a new one, with a tokenizer that fits; a new one is kept beside the checkpoint."""
    from .. import models
    from ..models.fresh import BYTES, check_preset, is_config

    check_preset(source)
    if not is_config(source):
        network, own = models.load(source, dtype=dtype)
        chosen = own if words is None else _tokenizer(words, data, network.config.vocab_size, state)
        if chosen is None:
            raise ValueError(f"{source} has no tokenizer; give --tokenizer.")
    else:
        config = models.read_config(source)
        own = models.load_tokenizer(source) if words is None and Path(source).is_dir() else None
        usual = "pairs" if config.vocab_size > BYTES else "bytes"
        chosen = own or _tokenizer(words or usual, data, config.vocab_size, state)
        config.eos_token_id, config.bos_token_id = chosen.eos_token_id, chosen.bos_token_id
        network = models.fresh(config, dtype=dtype or torch.float32, seed=seed)
    if len(chosen) > network.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(chosen)} tokens, but the model a vocabulary of {network.config.vocab_size}; "
            "give another --tokenizer, or a larger vocabulary."
        )
    return network, chosen


def _tokenizer(words: str, data: Sequence[str], size: int, state: Path | None) -> Any:
    """Make or load a tokenizer; one that is trained is kept beside the checkpoint."""
    from .. import models

    if words == "bytes":
        return models.byte_tokenizer()
    if words != "pairs":
        return models.load_tokenizer(words)
    if state is not None and (state / TOKENIZER).is_dir() and (stopped(state) or not leads()):
        return models.load_tokenizer(state / TOKENIZER)
    say("training a tokenizer")
    made = models.trained_tokenizer([text for _, text in _texts("--data", data)], size)
    if state is not None:
        made.save_pretrained(state / TOKENIZER)
    return made


def _texts(flag: str, words: Sequence[str]) -> list[tuple[str, str]]:
    """Read all texts, as (name, text); of JSON lines their texts."""
    return [(text.name, text.content) for word in words for text in texts_of(flag, word)]


def _ids(flag: str, words: Sequence[str], tokenizer: Any) -> Tensor:
    """Turn texts into one row of tokens, each closed by the end of text."""
    from ..models.texts import tokens

    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts = [tokens(tokenizer, text, name=name) for name, text in _texts(flag, words)]
    return torch.cat([each for part in parts for each in (part, torch.tensor(end, dtype=torch.long))])
