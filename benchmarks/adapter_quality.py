"""What adapters learn with equal numbers to train, each with its own best learning rate.

Usage: python benchmarks/adapter_quality.py --data DATA [--task NAME]... [--method NAME]... [--device cuda]
Writes results/adapter_quality.json, a row for each training; a second run goes on where the first stopped.

Tasks: SST-2, CoLA and MRPC (`minilm-l6` with a new head, which always trains: accuracy, Matthews correlation,
accuracy on the official development sets), and GSM8K's answers and Shakespeare (`smollm2-135m`: nats per label).
Every method gets the largest size whose numbers are not above those of LoRA with rank 8 on the same layers; those
that cannot have so many get the most they can. All see the same batches in the same order.

The learning rate is searched for each method in the same way, on the first task of each model with seed 0:
1e-3 and 3e-3, and on by half decades while the best one is at an end. The loss on texts kept aside from
the training set chooses it, and the step that remains; the figure is of other texts. The chosen rate is trained
with three seeds: of the head, the adapter and the examples.
"""

import argparse
import copy
import csv
import functools
import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Rows, read
from torch import nn

import rankwise
from rankwise import adapters, initialisers, rank_rules
from rankwise.core.labels import given
from rankwise.core.methods import Adapter, BlockAdapter
from rankwise.finetuning import finetune
from rankwise.models.causal import evaluating
from rankwise.models.classifier import is_head, load_classifier
from rankwise.models.embedded import embedded_folder
from rankwise.models.examples import read_examples
from rankwise.models.packing import packed

RANK = 8
RATES = [round(10 ** (k / 2), 7) for k in range(-10, 1)]  # 1e-5 ... 1
START = (4, 5)
SEEDS = (0, 1, 2)
READ = 10  # batches of which statistics are taken
Made = Callable[[int], Adapter | BlockAdapter]
Batches = list[dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """A method and the sizes it may have, smallest first.

    Args:
        make: gives the method of a size.
        sizes: to choose from; a single one is not counted.
        data: the method reads statistics.
    """

    make: Made
    sizes: Sequence[int] = (RANK,)
    data: bool = False


def lora(data: bool = False, **fields: Any) -> Entry:
    """A form of LoRA, all of which have the same numbers, but for the magnitudes of DoRA."""
    return Entry(lambda rank: adapters.Lora(rank=rank, **fields), data=data)


EVEN, RANKS = range(2, 257, 2), range(1, 385)
METHODS: dict[str, Entry | None] = {
    "head only": None,
    "LoRA": lora(),
    "rsLoRA": lora(rank_stabilised=True, alpha=RANK),
    "DoRA": lora(magnitudes=True),
    "PiSSA": Entry(lambda rank: adapters.Pissa(rank=rank)),
    "EVA": Entry(lambda rank: adapters.Eva(rank=rank), data=True),
    "AdaLoRA": Entry(lambda rank: adapters.AdaLora(rank=rank * 3 // 2, target=rank)),
    "MiSS": Entry(lambda rank: adapters.Miss(rank=rank), RANKS),
    "Bone (bat)": Entry(lambda block: adapters.Bat(block=block), range(4, 129, 4)),
    "Householder": Entry(lambda rank: adapters.Householder(rank=rank), EVEN),
    "LaMDA": Entry(lambda rank: adapters.Lamda(rank=rank), RANKS),
    "SVFit": Entry(lambda rank: adapters.Svfit(rank=rank), (384,)),
    "LoLDU": Entry(lambda rank: adapters.Loldu(rank=rank), (384,)),
    "SST": Entry(lambda rank: adapters.Sst(rank=rank), RANKS),
    "KronLoRA": Entry(lambda rank: adapters.KronLora(rank=rank), RANKS),
    "SNELLA": Entry(lambda rank: adapters.Snella(rank=rank), RANKS),
    "TeRA": Entry(lambda core: adapters.Tera(core=core), range(4, 257, 4)),
    "Compacter": Entry(
        lambda by: adapters.Compacter(reduction=by), (384, 192, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4)
    ),
    "LoRA, singular vectors": lora(start=initialisers.SingularVectors()),
    "LoRA, gradient SVD": lora(data=True, start=initialisers.GradientSvd()),
    "LoRA, normal outputs": lora(data=True, start=initialisers.NormalOutputs()),
    "LoRA, principal inputs": lora(data=True, start=initialisers.PrincipalInputs()),
    "LoRA, ranks by predicted decrease": lora(data=True, ranks=rank_rules.PredictedDecrease()),
    "LoRA, ranks by explained variance": lora(data=True, ranks=rank_rules.ExplainedVariance()),
}


@dataclass(frozen=True)
class Task:
    """A model and its data.

    Args:
        load: seed -> model, ready to be adapted.
        batches: seed -> batches to learn, in order.
        select: batches that choose the learning rate and the step.
        score: model -> the figure, on other texts.
        steps: of a training.
        tuning: the task that the learning rate is searched on.
        head: a classifier's head trains, too.
    """

    load: Callable[[int], Any]
    batches: Callable[[int], Batches]
    select: Batches
    score: Callable[[nn.Module], float]
    steps: int
    tuning: str
    head: bool


def pairs_of(path: Path, name: str) -> list[tuple[str, str | None, int]]:
    """Read (text, second text, label) of a GLUE task."""
    text = read(path) if path.suffix == ".xz" else path.read_text(encoding="utf-8")
    rows = list(csv.reader(io.StringIO(text.lstrip("\ufeff")), delimiter="\t", quoting=csv.QUOTE_NONE))
    if name == "CoLA":
        return [(row[3], None, int(row[1])) for row in rows]
    if name == "MRPC":
        return [(row[3], row[4], int(row[0])) for row in rows[1:]]
    return [(row[0].strip(), None, int(row[1])) for row in rows[1:]]


def encoded(rows: Sequence[tuple[str, str | None, int]], tokenizer: Any, size: int) -> Batches:
    """Make padded batches of texts or pairs of texts."""
    batches = []
    for low in range(0, len(rows), size):
        first, second, labels = zip(*rows[low : low + size], strict=True)
        pairs = None if second[0] is None else list(second)
        inputs = tokenizer(list(first), pairs, padding=True, truncation=True, max_length=96, return_tensors="pt")
        batches.append({**inputs, "labels": torch.tensor(labels)})
    return batches


def classes(data: Path, name: str, steps: int, size: int = 32) -> Task:
    """A GLUE task."""
    ending = {"CoLA": "dev.tsv"}.get(name, "dev.tsv.xz")
    dev, train = (pairs_of(data / "glue" / name / file, name) for file in (ending, "train.tsv.xz"))
    folder = embedded_folder("minilm-l6")
    tokenizer = load_classifier(folder, ("0", "1"))[1]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    select, learned = [train[i] for i in order[:256]], [train[i] for i in order[256:]]
    judged = encoded(by_length(dev), tokenizer, 64)

    def batches(seed: int) -> Batches:
        generator = torch.Generator().manual_seed(seed)
        drawn: list[int] = []
        while len(drawn) < steps * size:
            drawn += torch.randperm(len(learned), generator=generator).tolist()
        found = encoded(by_length([learned[i] for i in drawn[: steps * size]]), tokenizer, size)
        return [found[i] for i in torch.randperm(steps, generator=generator).tolist()]

    def score(model: nn.Module) -> float:
        found, labels = [], []
        with evaluating(model):
            for batch in judged:
                found += model(**given_to(model, batch)).logits.argmax(-1).tolist()
                labels += batch["labels"].tolist()
        return (matthews if name == "CoLA" else agreement)(found, labels)

    return Task(
        lambda seed: load_classifier(folder, ("0", "1"), dtype=torch.float32, seed=seed)[0],
        batches,
        encoded(by_length(select), tokenizer, 64),
        score,
        steps,
        "SST-2",
        head=True,
    )


def by_length(rows: Sequence[tuple[str, str | None, int]]) -> list[tuple[str, str | None, int]]:
    """Sort texts or pairs by their lengths, so that batches hold little padding."""
    return sorted(rows, key=lambda row: len(row[0]) + len(row[1] or ""))


def agreement(found: Sequence[int], labels: Sequence[int]) -> float:
    """The share that is right."""
    return sum(a == b for a, b in zip(found, labels, strict=True)) / len(labels)


def matthews(found: Sequence[int], labels: Sequence[int]) -> float:
    """Matthews' correlation of two kinds of labels."""
    counts = {(a, b): 0 for a in (0, 1) for b in (0, 1)}
    for pair in zip(found, labels, strict=True):
        counts[pair] += 1
    tp, tn, fp, fn = counts[1, 1], counts[0, 0], counts[1, 0], counts[0, 1]
    below = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(below) if below else 0.0


def words(data: Path, name: str, steps: int, window: int = 256, size: int = 4) -> Task:
    """A language model's task: examples of a file, shared out to learn, to choose and to judge."""
    folder = embedded_folder("smollm2-135m")
    tokenizer = rankwise.load(folder)[1]
    if name == "GSM8K":
        examples = read_examples(data / "gsm8k" / "train.jsonl.xz", tokenizer)[:1500]
    else:
        files = sorted((data / "tinyshakespeare").glob("*.xz"))
        text = "".join(read(file) for file in files)[:400_000]
        examples = read_examples_of(text, tokenizer)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    mixed = [examples[i] for i in order]
    rows: dict[str, Any] = {"rows": size}
    select, judged = packed(mixed[:100], window, **rows)[:6], packed(mixed[100:300], window, **rows)[:12]

    def batches(seed: int) -> Batches:
        return packed(mixed[300:], window, seed=seed, **rows)[:steps]

    def score(model: nn.Module) -> float:
        with evaluating(model):
            losses = [(float(given(model(**given_to(model, b)), b, torch.Generator())), count(b)) for b in judged]
        return sum(loss for loss, _ in losses) / sum(labels for _, labels in losses)

    def load(seed: int) -> Any:
        return rankwise.load(folder, dtype=torch.float32)[0]

    return Task(load, batches, select, score, steps, "GSM8K", head=False)


def read_examples_of(text: str, tokenizer: Any) -> list[Any]:
    """Cut a text into pieces of a few hundred tokens, each an example."""
    from rankwise.models.examples import Example

    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    pieces = [tuple(ids[low : low + 256]) for low in range(0, len(ids) - 256, 256)]
    return [Example(piece, (True,) * len(piece)) for piece in pieces]


def given_to(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """What a model is given of a batch, where it is."""
    device = next(model.parameters()).device
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}


def count(batch: dict[str, Any]) -> int:
    """How many labels a batch has."""
    return int((batch["labels"][:, 1:] >= 0).sum())


TASKS: dict[str, Callable[[Path], Task]] = {
    "SST-2": lambda data: classes(data, "SST-2", 100),
    "CoLA": lambda data: classes(data, "CoLA", 150),
    "MRPC": lambda data: classes(data, "MRPC", 100),
    "GSM8K": lambda data: words(data, "GSM8K", 40),
    "Shakespeare": lambda data: words(data, "Shakespeare", 40),
}


def sized(task: Task, entry: Entry | None) -> int:
    """Choose the largest size that trains no more numbers than LoRA does."""
    if entry is None:
        return 0
    if len(entry.sizes) == 1:
        return entry.sizes[0]
    model = task.load(0)

    def numbers(method: Adapter | BlockAdapter) -> int:
        return rankwise.adapt(copy.deepcopy(model), method).totals["trained"]

    budget, best = numbers(adapters.Lora(rank=RANK)), None
    low, high = 0, len(entry.sizes) - 1
    while low <= high:
        middle = (low + high) // 2
        try:
            fits = numbers(entry.make(entry.sizes[middle])) <= budget
        except ValueError:
            fits = False
        if fits:
            best, low = entry.sizes[middle], middle + 1
        else:
            high = middle - 1
    if best is None:
        raise ValueError("no size is small enough.")
    return best


def train(
    task: Task, entry: Entry | None, size: int, lr: float, seed: int, device: torch.device
) -> dict[str, Any]:
    """Adapt, train and judge once."""
    model, batches, start = task.load(seed).to(device), task.batches(seed), time.perf_counter()
    whole = {name for name, _ in model.named_parameters() if task.head and is_head(model, name)}
    if entry is None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in whole)
    else:
        method = entry.make(size)
        about: dict[str, Any] = {"data": batches[:READ], "labels": given} if entry.data else {}
        if task.head:
            about["also"] = whole.__contains__
        if not isinstance(method, BlockAdapter):
            about["where"] = lambda name, _: f"{name}.weight" not in whole
        rankwise.adapt(model, method, seed=seed, **about)
    began = time.perf_counter()
    every = max(1, task.steps // 4)
    report = finetune(model, batches, held_out=task.select, lr=lr, steps=task.steps, every=every, seed=seed)
    totals, looks = report.totals, report.rows
    memory = totals["memory"]
    return {
        "lr": lr,
        "seed": seed,
        "size": size,
        "trained": totals["trained"],
        "select": totals["held_out"]["after"],
        "looks": [round(row["held_out"], 4) if row["held_out"] is not None else None for row in looks],
        "score": task.score(model),
        "training_bytes": memory["gradients"] + memory["optimizer"] + memory["activations"],
        "device": device.type,
        "adapt_seconds": round(began - start, 2),
        "seconds": round(time.perf_counter() - began, 1),
    }


class Bench:
    """Trains what is not in the results yet.

    Args:
        rows: the results.
        data: the folder of the texts.
        device: where to train.
    """

    def __init__(self, rows: Rows, data: Path, device: torch.device) -> None:
        self.rows, self.data, self.device = rows, data, device
        self.task = functools.cache(lambda name: TASKS[name](data))
        self.size = functools.cache(lambda name, method: sized(self.task(name), METHODS[method]))

    def run(self, name: str, method: str, place: int, seed: int) -> dict[str, Any]:
        """Return the row of a training, from the file or made now."""
        about = {"task": name, "method": method, "lr": RATES[place], "seed": seed}
        if not self.rows.has(**about):
            task, entry, size = self.task(name), METHODS[method], self.size(name, method)
            try:
                found = train(task, entry, size, RATES[place], seed, self.device)
            except ValueError as error:  # numbers that are not finite
                found = {"size": size, "select": None, "failed": str(error)}
            self.rows.add(**about | found)
        return self.rows.find(**about)

    def best(self, name: str, method: str) -> int:
        """Search the learning rate of a method on a task; returns its place in ``RATES``."""

        def loss(place: int) -> float:
            found = self.run(name, method, place, 0)["select"]
            return math.inf if found is None else found

        tried = {place: loss(place) for place in START}
        while True:
            best = min(tried, key=lambda place: tried[place])
            edges = {min(tried): min(tried) - 1, max(tried): max(tried) + 1}
            if best not in edges or not 0 <= edges[best] < len(RATES):
                return best
            tried[edges[best]] = loss(edges[best])

    def compare(self, name: str, method: str) -> None:
        """Train a method on a task at its own rate, with every seed."""
        place = self.best(self.task(name).tuning, method)
        for seed in SEEDS:
            self.run(name, method, place, seed)["chosen"] = True
        self.rows.write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", action="append", choices=list(TASKS))
    parser.add_argument("--method", action="append", choices=list(METHODS))
    parser.add_argument("--out", type=Path, default=RESULTS / "adapter_quality.json")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options = parser.parse_args()
    bench = Bench(Rows(options.out), options.data, options.device)
    for name in options.task or TASKS:
        for method in options.method or METHODS:
            if METHODS[method] is not None or bench.task(name).head:
                bench.compare(name, method)


if __name__ == "__main__":
    main()
