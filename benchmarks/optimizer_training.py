"""What optimisers reach with equal tokens, each at its own best learning rate.

Usage: python benchmarks/optimizer_training.py --data DATA [--size 10M] [--steps 300] [--method NAME]...
Writes results/optimizer_training.json, a row for each training; a second run goes on where the first stopped.
``--smoke`` gives every method some steps on a tiny model and a text of Python.

A byte-level Llama learns Wikipedia articles, no byte twice while they last. A method steps the matrices of the
blocks, with rank a quarter of the side; embeddings, head and norms get AdamW at the rate that is best for AdamW
alone (so that one is first). Rates rise over a tenth of the steps and fall to a tenth by a cosine; gradients are
clipped to norm 1; there is no weight decay. All see the same batches in the same order.

Every method has five trials of its learning rate, with seed 0 and of all steps (in shorter ones the least rate
wins, as the blocks do not matter yet): three half decades around what is usual for it, and then, twice, the next
half decade where the best one is at an end, else a quarter decade beside it. The loss on articles kept aside
chooses. The rate is then trained with two more seeds, of the model and the batches, and judged by other articles
and by another text (wikitext-2), in nats a byte. ``step_ms`` is the median time of the optimiser's own step,
``most_ms`` its longest after the first; ``state`` its bytes.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Rows, read
from torch import Tensor, nn

import rankwise
from rankwise.core.transforms import Transform
from rankwise.models import embedded_texts
from rankwise.optimizers import (
    adafactor,
    adam,
    adamp,
    adamw4bit,
    adamw8bit,
    apollo,
    apollo_mini,
    aro,
    auon,
    dct_adamw,
    fira,
    frugal,
    galore,
    hybrid_auon,
    ldadam,
    muon,
    q_galore,
    sgd,
    sgdp,
    sign,
    soap,
    trion,
)
from rankwise.projectors import Backoff, LargestRows, Randomised, Svd

SIZES = {"10M": (320, 8), "3M": (192, 6), "1M": (128, 4), "smoke": (32, 1)}  # hidden size, layers
SEEDS = (0, 1, 2)
TRIALS = 5
RANK, EVERY = 0.25, 25  # a share of the side; steps of a subspace, in trainings as short as these
WINDOW, ROWS = 128, 8


@dataclass(frozen=True)
class Entry:
    """A method, and four times the decimal logarithm of a usual learning rate."""

    make: Callable[[], Transform]
    usual: int


METHODS = {
    "AdamW": Entry(adam, -11),
    "AdamW, 8 bits": Entry(adamw8bit, -11),
    "AdamW, 4 bits": Entry(adamw4bit, -11),
    "SGD, momentum": Entry(lambda: sgd(beta=0.9), -4),
    "signSGD": Entry(sign, -14),
    "Adafactor": Entry(lambda: adafactor(beta=0.9), -10),
    "AdamP": Entry(adamp, -11),
    "SGDP": Entry(sgdp, -4),
    "GaLore, warm power": Entry(lambda: galore(rank=RANK, every=EVERY), -8),
    "GaLore, SVD": Entry(lambda: galore(rank=RANK, every=EVERY, projector=Svd()), -8),
    "GaLore, randomised": Entry(lambda: galore(rank=RANK, every=EVERY, projector=Randomised()), -8),
    "GaLore, Adafactor": Entry(lambda: galore(rank=RANK, every=EVERY, inner=adafactor(beta=0.9)), -8),
    "GaLore, 8 bits": Entry(lambda: galore(rank=RANK, every=EVERY, inner=adamw8bit()), -8),
    "Q-GaLore": Entry(lambda: q_galore(rank=RANK, every=Backoff(EVERY)), -8),  # of float32 weights
    "DCT-AdamW": Entry(lambda: dct_adamw(rank=RANK), -10),
    "DCT-AdamW, feedback": Entry(lambda: dct_adamw(rank=RANK, feedback=True), -10),
    "largest rows, feedback": Entry(lambda: dct_adamw(rank=RANK, feedback=True, projector=LargestRows()), -10),
    "FRUGAL": Entry(lambda: frugal(density=RANK, every=EVERY), -11),
    "Fira": Entry(lambda: fira(rank=RANK, every=EVERY), -8),
    "APOLLO": Entry(lambda: apollo(rank=RANK, every=EVERY), -8),
    "APOLLO-Mini": Entry(lambda: apollo_mini(every=EVERY), -8),
    "LDAdam": Entry(lambda: ldadam(rank=RANK), -10),
    "SOAP": Entry(soap, -10),
    "Muon": Entry(muon, -6),
    "Trion": Entry(lambda: trion(rank=RANK), -6),
    "ARO": Entry(aro, -8),
    "AuON": Entry(auon, -3),
    "Hybrid AuON": Entry(hybrid_auon, -6),
}


@dataclass(frozen=True)
class Texts:
    """Bytes to learn, to choose a learning rate by, and to judge by."""

    learn: Tensor
    choose: Tensor
    judge: dict[str, Tensor]


def load_texts(data: Path | None) -> Texts:
    """Share out the articles; without data, a text of Python's."""
    if data is None:
        known = as_bytes(embedded_texts()["topics"])
        return Texts(known[:-4_000], known[-4_000:-2_000], {"held_out": known[-2_000:]})
    articles = as_bytes(read(data / "calib_mix" / "wiki.utf8.xz"))
    other = as_bytes(read(data / "wikitext2" / "wiki.valid.raw.xz"))[:100_000]
    judge = {"held_out": articles[-100_000:], "wikitext2": other}
    return Texts(articles[:-150_000], articles[-150_000:-100_000], judge)


def as_bytes(text: str) -> Tensor:
    """Return a text as numbers from 0 to 255."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def windows(text: Tensor) -> Tensor:
    """Cut a text into windows, (many, WINDOW + 1)."""
    return text[: len(text) // (WINDOW + 1) * (WINDOW + 1)].view(-1, WINDOW + 1)


def batches(text: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """Draw windows, each once as long as there are enough."""
    every, generator = windows(text), torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(every), generator=generator).split(ROWS):
            if steps <= 0:
                return
            yield every[rows]
            steps -= 1


def build(size: str, seed: int) -> nn.Module:
    """Make a Llama of bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers = SIZES[size]
    heads = {"num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 32}
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=hidden * 27 // 10,
        num_hidden_layers=layers,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=False,
        use_cache=False,
        **heads,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the mean loss of the next bytes."""
    logits = model(input_ids=batch[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def judged(model: nn.Module, text: Tensor) -> float | None:
    """Return nats a byte; None where they are not finite."""
    rows = windows(text).split(4 * ROWS)
    total = sum(float(loss_of(model, each)) * len(each) for each in rows) / sum(map(len, rows))
    return round(total, 5) if math.isfinite(total) else None


def rate(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step from zero."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm))


def train(
    texts: Texts, size: str, steps: int, entry: Entry, lr: float, rest_lr: float, seed: int
) -> dict[str, Any]:
    """Train once, and judge."""
    model = build(size, seed)
    blocks = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not q for q in blocks)]
    groups = [
        {"params": blocks, "transform": entry.make(), "lr": lr},
        {"params": rest, "transform": adam(), "lr": rest_lr},
    ]
    optimizer = rankwise.Optimizer(groups, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    begun, times = time.perf_counter(), []
    about = {"parameters": sum(p.numel() for p in model.parameters()), "state": optimizer.state_bytes()}
    try:
        for batch in batches(texts.learn, steps, seed):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            start = time.perf_counter()
            optimizer.step()
            times.append(time.perf_counter() - start)
            schedule.step()
    except FloatingPointError as error:
        return {**about, "choose": None, "failed": str(error)}
    later = times[1:] or times
    return {
        **about,
        "choose": judged(model, texts.choose),
        **{name: judged(model, text) for name, text in texts.judge.items()},
        "step_ms": round(1000 * statistics.median(later), 2),
        "most_ms": round(1000 * max(later), 2),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def next_trial(tried: dict[int, float]) -> int:
    """Return which learning rate to try: outside of an end that is best, else near the best one.

    >>> next_trial({-2: 3.0, 0: 2.0, 2: 1.0}), next_trial({-2: 3.0, 0: 1.0, 2: 2.0})
    (4, -1)
    """
    best, low, high = min(tried, key=lambda place: tried[place]), min(tried), max(tried)
    if best in (low, high):
        return best - 2 if best == low else best + 2
    return min(set(range(low, high)) - set(tried), key=lambda place: (abs(place - best), place))


class Bench:
    """Trains what is not in the results yet.

    Args:
        rows: the results.
        texts: to learn and to judge by.
        size: of the model.
        steps: of a training.
        seeds: of those at the chosen rate.
    """

    def __init__(self, rows: Rows, texts: Texts, size: str, steps: int, seeds: tuple[int, ...] = SEEDS) -> None:
        self.rows, self.texts, self.size, self.steps, self.seeds = rows, texts, size, steps, seeds

    def run(self, method: str, place: int, rest: int, seed: int) -> dict[str, Any]:
        """Return the row of a training, from the file or made now."""
        lr, rest_lr = (round(10 ** (each / 4), 8) for each in (place, rest))
        about = {
            "size": self.size,
            "steps": self.steps,
            "method": method,
            "lr": lr,
            "rest_lr": rest_lr,
            "seed": seed,
        }
        if not self.rows.has(**about):
            found = train(self.texts, self.size, self.steps, METHODS[method], lr, rest_lr, seed)
            self.rows.add(**about, **found)
        return self.rows.find(**about)

    def best(self, method: str, rest: int | None) -> int:
        """Search the learning rate of a method; returns its place. AdamW steps all at one rate."""
        usual, tried = METHODS[method].usual, {}
        for trial in range(TRIALS):
            place = usual + 2 * (trial - 1) if trial < 3 else next_trial(tried)
            row = self.run(method, place, place if rest is None else rest, 0)
            tried[place] = math.inf if row["choose"] is None else row["choose"]
        return min(tried, key=lambda place: tried[place])

    def compare(self, methods: list[str]) -> None:
        """Search and train each method, after AdamW."""
        rest = self.best("AdamW", None)
        for method in methods:
            place = rest if method == "AdamW" else self.best(method, rest)
            for seed in self.seeds:
                self.run(method, place, rest, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--size", choices=[size for size in SIZES if size != "smoke"], default="10M")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--method", action="append", choices=list(METHODS))
    parser.add_argument("--out", type=Path, default=RESULTS / "optimizer_training.json")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    methods = options.method or list(METHODS)
    if options.smoke:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Rows(Path(folder) / "smoke.json"), load_texts(None), "smoke", 2, seeds=(0,))
            bench.compare(methods)
        return
    if options.data is None:
        parser.error("--data is needed.")
    Bench(Rows(options.out), load_texts(options.data), options.size, options.steps).compare(methods)


if __name__ == "__main__":
    main()
