"""How many bytes optimisers keep for Llamas of 60M to 7B parameters; do published savings follow by count?

Usage: python benchmarks/state_bytes.py [--json benchmarks/results/state_bytes.json] [--smoke]

Parts: ``state``, the bytes that the predictor counts from shapes alone, for each size and method, and for 60M
also what stands in the state after one step of bfloat16 weights with random gradients. Matrices of the blocks get
the method with GaLore's rank for the size; embeddings, head and norms get AdamW, in 8 or 4 bits where the method
has such moments. ``claim``, the published savings beside what counting gives, by each way of counting named.
``table``, published gigabytes of weights and states beside the counted ones; those of Q-GaLore are recalled.

The shapes are those of GaLore's configurations (head and embeddings not tied, vocabulary of 32000).
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from common import RESULTS, Rows
from torch import nn

import rankwise
from rankwise.core.states import leaves
from rankwise.core.transforms import Transform, state_bytes
from rankwise.matrices import IndexedSparse
from rankwise.optimizers import (
    adafactor,
    adam,
    adamw4bit,
    adamw8bit,
    apollo,
    apollo_mini,
    dct_adamw,
    fira,
    frugal,
    galore,
    grad_norm_lorp,
    ldadam,
    muon,
    q_galore,
    quantised,
    soap,
)

VOCABULARY = 32_000


@dataclass(frozen=True)
class Llama:
    """Sides and counts of a decoder, and the rank that GaLore gives it."""

    width: int
    inner: int
    layers: int
    rank: int

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Queries, keys, values, output, gate, up and down of all blocks."""
        d, f = self.width, self.inner
        return [(d, d), (d, d), (d, d), (d, d), (f, d), (f, d), (d, f)] * self.layers

    @property
    def others(self) -> list[tuple[int, ...]]:
        """Embeddings, head and norms."""
        return [(VOCABULARY, self.width)] * 2 + [(self.width,)] * (2 * self.layers + 1)

    @property
    def numbers(self) -> int:
        """All parameters."""
        return sum(math.prod(shape) for shape in [*self.matrices, *self.others])


SIZES = {
    "60M": Llama(512, 1376, 8, 128),
    "130M": Llama(768, 2048, 12, 256),
    "350M": Llama(1024, 2736, 24, 256),
    "1B": Llama(2048, 5461, 24, 512),
    "7B": Llama(4096, 11008, 32, 1024),
}
PUBLISHED = {  # G of weights and states: those of the first two from GaLore's table, those of Q-GaLore recalled
    "60M": {"AdamW": 0.36, "GaLore": 0.24, "Q-GaLore": 0.18},
    "130M": {"AdamW": 0.76, "GaLore": 0.52, "Q-GaLore": 0.39},
    "350M": {"AdamW": 2.06, "GaLore": 1.22, "Q-GaLore": 0.88},
    "1B": {"AdamW": 7.80, "GaLore": 4.38, "Q-GaLore": 3.08},
}
SMOKE = {"smoke": Llama(32, 64, 1, 8)}


@dataclass(frozen=True)
class Method:
    """A transform for the matrices of the blocks, given a rank and the shorter side, and one for all else."""

    make: Callable[[int, int], Transform]
    other: Transform = adam()  # noqa: RUF009 (frozen)


METHODS = {
    "AdamW": Method(lambda rank, side: adam()),
    "AdamW, 8 bits": Method(lambda rank, side: adamw8bit(), adamw8bit()),
    "AdamW, 4 bits": Method(lambda rank, side: adamw4bit(), adamw4bit()),
    "Adafactor": Method(lambda rank, side: adafactor(), adafactor()),
    "Muon": Method(lambda rank, side: muon()),
    "GaLore": Method(lambda rank, side: galore(rank=rank)),
    "GaLore, 8 bits": Method(lambda rank, side: galore(rank=rank, inner=adamw8bit()), adamw8bit()),
    "Q-GaLore": Method(lambda rank, side: q_galore(rank=rank), adamw8bit()),
    "DCT-AdamW": Method(lambda rank, side: dct_adamw(rank=rank)),
    "DCT-AdamW, 8 bits": Method(lambda rank, side: quantised(dct_adamw(rank=rank)), adamw8bit()),
    "Fira": Method(lambda rank, side: fira(rank=rank)),
    "LDAdam": Method(lambda rank, side: ldadam(rank=rank)),
    "APOLLO": Method(lambda rank, side: apollo(rank=rank)),
    "APOLLO-Mini": Method(lambda rank, side: apollo_mini()),
    "SOAP": Method(lambda rank, side: soap()),
    "SOAP, 8 bits": Method(lambda rank, side: quantised(soap()), adamw8bit()),
    "FRUGAL": Method(lambda rank, side: frugal(density=rank / side)),
    "FRUGAL, density 0": Method(lambda rank, side: frugal(density=0.0)),
}


def optimizer(model: Llama, method: Method, device: str) -> rankwise.Optimizer:
    """Return an optimiser of bfloat16 parameters of the model's shapes."""

    def parameters(shapes):
        return [nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16, device=device)) for shape in shapes]

    pairs = [
        (parameters(model.matrices), method.make(model.rank, model.width)),
        (parameters(model.others), method.other),
    ]
    return rankwise.Optimizer(pairs, lr=1e-3)


def measured(model: Llama, method: Method) -> int:
    """Count what stands after a step, taken parameter by parameter so that one gradient is there at a time."""
    made, generator = optimizer(model, method, "cpu"), torch.Generator().manual_seed(0)
    for param in (p for group in made.param_groups for p in group["params"]):
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        made.step_one(param)
        param.grad = None
    return sum(leaf.nbytes for state in made.state.values() for leaf in leaves(state))


def states(rows: Rows, sizes: dict[str, Llama], real: str) -> None:
    """Predict for all sizes, and measure one."""
    for size, model in sizes.items():
        for name, method in METHODS.items():
            if rows.has(part="state", size=size, method=name):
                continue
            begin = time.perf_counter()
            predicted = optimizer(model, method, "meta").state_bytes()
            about = {"seconds": time.perf_counter() - begin, "rank": model.rank, "numbers": model.numbers}
            found = {"measured": measured(model, method)} if size == real else {}
            rows.add(part="state", size=size, method=name, predicted=predicted, **found, **about)


def numbers(transform: Transform, shapes: list[tuple[int, ...]]) -> int:
    """Count the numbers of float32 states; what else is there is counters, less than 40 bytes a parameter."""
    return sum(state_bytes(transform, torch.empty(shape, device="meta")) // 4 for shape in shapes)


def claims(rows: Rows, model: Llama) -> None:
    """Count the published savings, for the largest model, in numbers and in the bytes that papers give them.

    Papers compare with Adam in bfloat16, two bytes a number; 8-bit moments take one.
    """
    everything = [*model.matrices, *model.others]
    dense = numbers(adam(), everything)
    embedded = numbers(adam(), model.others)
    moments = sum(2 * min(model.rank, *shape) * max(shape) for shape in model.matrices)
    bases = sum(model.rank * min(shape) for shape in model.matrices)
    assert abs(numbers(galore(rank=model.rank), model.matrices) - moments - bases) < 10 * len(model.matrices)

    def add(method: str, claim: float, counted: float, how: str) -> None:
        rows.add(part="claim", method=method, claimed=claim, counted=counted, how=how)

    adamw, galore_ = 2 * dense, 2 * (moments + bases + embedded)
    eight = moments + embedded
    add("GaLore, state", 0.655, 1 - galore_ / adamw, "all in bfloat16")
    add("GaLore 8 bits, state", 0.825, 1 - (eight + bases) / adamw, "moments and bases in 8 bits")
    add("GaLore 8 bits, state", 0.825, 1 - (eight + 2 * bases) / adamw, "bases in bfloat16, as in its code")
    add("GaLore 8 bits, state", 0.825, 1 - (eight + bases / 2) / adamw, "bases in 4 bits, as in Q-GaLore")
    weights, gradients = 2 * model.numbers, 2 * model.numbers
    one = 2 * max(math.prod(shape) for shape in everything)
    whole = weights + gradients + adamw
    add("GaLore 8 bits, in all", 0.633, 1 - (weights + eight + 2 * bases + one) / whole, "one gradient at a time")

    for share in (1.0, 0.5, 0.25):  # of the rank of adapters that have GaLore's rank
        factors = [side for m, n in model.matrices for side in ((m, model.rank), (model.rank, n))]
        rank = int(share * model.rank)
        kept = sum(2 * rank * max(shape) + (rank * min(shape) if rank < min(shape) else 0) for shape in factors)
        magnitudes = 2 * sum(m for m, _ in model.matrices)
        how = f"8 bits, adapters of rank {model.rank}, gradients of rank {rank}, bases in 8 bits, "
        state = kept + magnitudes
        add("GradNormLoRP, state", 0.895, 1 - (state + embedded) / adamw, how + "embeddings and head trained")
        add("GradNormLoRP, state", 0.895, 1 - state / adamw, how + "embeddings and head frozen")

    both = numbers(grad_norm_lorp(rank=model.rank, two_sided=True), model.matrices)
    how = f"8 bits, whole weights projected on both sides to rank {model.rank}, bases in 8 bits"
    add("GradNormLoRP, state", 0.895, 1 - (both + embedded) / adamw, how)

    sparse = sum(int(0.05 * m * n) for m, n in model.matrices)
    left = sum(model.rank * (m + n) for m, n in model.matrices) + sparse + embedded // 2
    largest = 2 * model.rank * (model.width + model.inner)
    _, _, short = zip(
        *(IndexedSparse.stored(m, n, torch.tensor(int(0.05 * m * n))) for m, n in model.matrices), strict=True
    )
    for bytes_, how in (
        (8 * sparse, "8 bytes an index, as in its code"),
        (4 * sparse, "4 bytes"),
        (int(sum(short)), "2 bytes, as here"),
        (0, "none"),
    ):
        total = 2 * left + bytes_ + 2 * left + max(one, largest)
        text = f"8 bits, one gradient at a time, indices: {how}"
        add("SLTrain, in all", 0.73, 1 - total / whole, text)


def table(rows: Rows, size: str, model: Llama) -> None:
    """Count weights and states: bfloat16, but for Q-GaLore 8-bit matrices and the state of the first part."""
    others = sum(math.prod(shape) for shape in model.others)
    dense, embedded = numbers(adam(), [*model.matrices, *model.others]), numbers(adam(), model.others)
    low = numbers(galore(rank=model.rank), model.matrices) + embedded
    integers = sum(m * n + 8 * m * -(-n // 256) for m, n in model.matrices)
    state = rows.find(part="state", size=size, method="Q-GaLore")["predicted"]
    counted = {
        "AdamW": 2 * (model.numbers + dense),
        "GaLore": 2 * (model.numbers + low),
        "Q-GaLore": integers + 2 * others + state,
    }
    for method, bytes_ in counted.items():
        rows.add(
            part="table", size=size, method=method, counted=bytes_, claimed=PUBLISHED.get(size, {}).get(method)
        )


def main() -> None:
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS / "state_bytes.json")
    parser.add_argument("--smoke", action="store_true", help="one tiny model, to see that it runs")
    options = parser.parse_args()
    rows, sizes = Rows(options.json), SMOKE if options.smoke else SIZES
    states(rows, sizes, "smoke" if options.smoke else "60M")
    if not rows.has(part="claim"):
        claims(rows, list(sizes.values())[-1])
    if not rows.has(part="table"):
        for size, model in sizes.items():
            table(rows, size, model)


if __name__ == "__main__":
    main()
