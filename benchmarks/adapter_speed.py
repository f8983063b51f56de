"""Seconds of a training step with adapters beside peft's, and bytes kept for the backward pass, on a real model.

Usage: python benchmarks/adapter_speed.py [--pairs 12]
Writes results/adapter_speed.json. The model is `smollm2-135m` with rank 16 on all its linear layers, 512 tokens
at a time under autocast to bfloat16, AdamW. Both take one step in turn, ours first in one pair and second in
the next; the ratio is the median over the pairs, which a busy machine disturbs least.
"""

import argparse
import functools
import gc
import json
import statistics
import time
from importlib.metadata import version
from typing import Any

import torch
from common import RESULTS, command, environment, saved_bytes
from torch import nn

import rankwise
from rankwise.adapters import Lora
from rankwise.models import embedded_texts, tokens

RANK, LENGTH = 16, 512


def ours(model: nn.Module, dora: bool) -> nn.Module:
    rankwise.adapt(model, Lora(rank=RANK, alpha=float(RANK), magnitudes=dora))
    return model


def theirs(model: nn.Module, dora: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", use_dora=dora)
    return get_peft_model(model, config)  # pyright: ignore[reportArgumentType]


class Trainer:
    """Takes single steps and tells their seconds."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.model(input_ids=ids, labels=ids, use_cache=False).loss

    def step(self, ids: torch.Tensor) -> float:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.loss(ids).backward()
        self.optimizer.step()
        return time.perf_counter() - start


def compare(dora: bool, pairs: int) -> dict[str, Any]:
    """Time one method, both ways."""
    text = embedded_texts()["topics"]
    trainers = {}
    for name, make in (("rankwise", ours), ("peft", theirs)):
        model, tokenizer = rankwise.load("smollm2-135m", dtype=torch.float32)
        trainers[name] = Trainer(make(model, dora))
    ids = tokens(tokenizer, text, limit=LENGTH * (pairs + 1)).view(-1, 1, LENGTH)
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for i, window in enumerate(ids):
        order = list(trainers) if i % 2 else list(reversed(trainers))
        for name in order:
            seconds[name].append(trainers[name].step(window))
    ratios = [a / b for a, b in zip(seconds["rankwise"], seconds["peft"], strict=True)][1:]  # the first warms up
    return {
        "method": "DoRA" if dora else "LoRA",
        "trained": {name: sum(p.numel() for p in each.trained) for name, each in trainers.items()},
        "saved_bytes": {
            name: saved_bytes(t.model, functools.partial(t.loss, ids[0]))[0] for name, t in trainers.items()
        },
        "median_seconds": {name: statistics.median(each[1:]) for name, each in seconds.items()},
        "ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4),
        "pairs": len(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12)
    options = parser.parse_args()
    rows = []
    for dora in (False, True):
        rows.append(compare(dora, options.pairs))
        print(json.dumps(rows[-1]), flush=True)
        gc.collect()
    about = {"command": command(), "environment": {**environment(), "peft": version("peft")}}
    text = json.dumps({**about, "rows": rows}, indent=1)
    (RESULTS / "adapter_speed.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
