"""Training on a GPU: the memory and time of a step of a 7B Llama, and losses of small ones after equal time.

Usage: python benchmarks/gpu_training.py [--data DATA] [--part memory|curves]... [--minutes 8] [--smoke]
Writes results/gpu_training.json; a second run goes on where the first stopped. ``--smoke`` runs tiny models on
the CPU, where there is no peak to read.

``memory``: bfloat16 weights of Llama-7B's shape with a vocabulary of 32000, one sequence of 256 tokens,
activations recomputed, each matrix stepped inside the backward pass and its gradient freed. The peak is the
allocator's own (``max_memory_allocated``) over all steps, the first of which finds every subspace; step times are
medians of the later ones. Published: GaLore in 8 bits below 24 GB, Q-GaLore below 16 GB.
``curves``: Llamas of 60M and 130M of bytes, ``--minutes`` each for every method, at one learning rate for each
that is usual for it (none is searched): the mean loss of the last steps against steps and seconds.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from common import RESULTS, Rows
from optimizer_training import batches, load_texts
from torch import Tensor, nn

import rankwise
from rankwise.core.modes import recomputing
from rankwise.core.transforms import Transform
from rankwise.models.fresh import read_config
from rankwise.optimizers import adam, adamw8bit, dct_adamw, galore, muon, q_galore, quantised

TINY = "llama:hidden=64,layers=2,heads=4,intermediate=128,vocab=512"
WINDOW, STEPS = 256, 6


@dataclass(frozen=True)
class Recipe:
    """What steps the matrices of the blocks, what all else, and whether weights are integers of 8 bits."""

    make: Callable[[int], Transform]
    other: Transform
    integers: bool = False


MEMORY = {
    "AdamW, 8 bits": Recipe(lambda rank: adamw8bit(), adamw8bit()),
    "GaLore, 8 bits": Recipe(lambda rank: galore(rank=rank, inner=adamw8bit()), adamw8bit()),
    "Q-GaLore": Recipe(lambda rank: q_galore(rank=rank), adamw8bit(), integers=True),
    "DCT-AdamW, 8 bits": Recipe(lambda rank: quantised(dct_adamw(rank=rank)), adamw8bit()),
}
CURVES = {
    "AdamW": (lambda: adam(), 1e-3),
    "GaLore": (lambda: galore(rank=0.25, every=50), 1e-2),
    "DCT-AdamW": (lambda: dct_adamw(rank=0.25), 3e-3),
    "Muon": (lambda: muon(), 2e-2),
}


def llama(source: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Make a Llama with random weights where it is trained."""
    from transformers import AutoModelForCausalLM

    config = read_config(source)
    config.use_cache = False
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.train()


def peak(device: torch.device) -> int | None:
    """Return the most bytes that were allocated at once."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def wait(device: torch.device) -> None:
    """Wait for the device, so that times are those of the work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(source: str, rank: int, recipe: Recipe, device: torch.device) -> dict:
    """Take some steps of a model whose weights just fit."""
    model = llama(source, device, torch.bfloat16)
    write = rankwise.StochasticRounding()
    if recipe.integers:
        rankwise.train_as_integers(model)
        write = rankwise.IntegerWeights(model)
    groups = [
        {"params": [p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2]},
        {"params": [p for n, p in model.named_parameters() if ".layers." not in n or p.ndim != 2]},
    ]
    transforms = (recipe.make(rank), recipe.other)
    pairs = [{**group, "transform": each} for group, each in zip(groups, transforms, strict=True)]
    optimizer = rankwise.Optimizer(pairs, lr=1e-4, write=write)
    layers = rankwise.Layerwise(optimizer)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    ids = torch.randint(0, model.config.vocab_size, (1, WINDOW), device=device)
    seconds = []
    with recomputing(model, True):
        for _ in range(STEPS):
            wait(device)
            start = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            wait(device)
            seconds.append(time.perf_counter() - start)
    found = {
        "weights": sum(t.nbytes for t in [*model.parameters(), *model.buffers()] if t.stride() != (0, 0)),
        "state": optimizer.state_bytes(),
        "peak": peak(device),
        "first_seconds": round(seconds[0], 3),
        "step_seconds": round(statistics.median(seconds[1:]), 4),
    }
    layers.remove()
    return found


def curve(
    source: str, transform: Transform, lr: float, learn: Iterator[Tensor], minutes: float, device: torch.device
) -> dict:
    """Train for some time; returns losses along the way."""
    model = llama(source, device, torch.float32)
    groups = rankwise.parameter_groups(model, transform, lr=lr, other_lr=1e-3)
    optimizer = rankwise.Optimizer(groups, lr=lr)
    start, losses, points = time.perf_counter(), [], []
    for batch in learn:
        done = (time.perf_counter() - start) / (60 * minutes)
        if done >= 1:
            break
        for group, first in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = first["lr"] * min(1.0, len(losses) / 100 + 0.01) * max(0.05, 1 - done)
        ids = batch[:, :-1].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        if len(losses) % 100 == 0:
            mean = float(torch.stack(losses[-100:]).mean())
            points.append([len(losses), round(time.perf_counter() - start, 1), round(mean, 4)])
    last = float(torch.stack(losses[-100:]).mean())
    return {"steps": len(losses), "loss": round(last, 4), "points": points, "state": optimizer.state_bytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--part", action="append", choices=["memory", "curves"])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_training.json")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        parser.error("there is no GPU; --smoke runs tiny models on the CPU.")
    device = torch.device("cpu" if options.smoke else "cuda")
    name = "cpu" if options.smoke else torch.cuda.get_device_name()
    sizes, rank = ((TINY,), 8) if options.smoke else (("llama-7b",), 1024)
    rows, parts = Rows(options.out), options.part or ["memory", "curves"]
    for size, (method, recipe) in ((size, item) for size in sizes for item in MEMORY.items()):
        if "memory" in parts and not rows.has(part="memory", size=size, method=method, device=name):
            rows.add(part="memory", size=size, method=method, device=name, **memory(size, rank, recipe, device))
    sizes = (TINY,) if options.smoke else ("llama-60m", "llama-130m")
    minutes = 0.02 if options.smoke else options.minutes
    texts = load_texts(options.data)
    for size, (method, (make, lr)) in ((size, item) for size in sizes for item in CURVES.items()):
        if "curves" in parts and not rows.has(part="curves", size=size, method=method, device=name):
            learn = batches(texts.learn, 1_000_000, seed=0)
            found = curve(size, make(), lr, learn, minutes, device)
            rows.add(part="curves", size=size, method=method, device=name, lr=lr, **found)


if __name__ == "__main__":
    main()
