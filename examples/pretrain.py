"""Pretrain a small Llama with GaLore, step by step in the backward pass, stop it, and go on where it stopped.

Run it as ``python examples/pretrain.py``, or with ``--smoke`` on a tiny model, in a few seconds.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

import rankwise
from rankwise.optimizers import galore

SMALL = "llama:hidden=32,layers=2,heads=4,intermediate=64"
LARGER = "llama:hidden=256,layers=4,heads=8,intermediate=688"


class Stop(Exception):
    """What stands for a power cut."""


def new_run(words: str, rank: int) -> tuple[Any, rankwise.Optimizer]:
    """Make a new model, the same each time, and its optimiser."""
    model = rankwise.models.fresh(words, seed=0)  # its tokens are bytes
    # GaLore for attention and MLP matrices, Adam for embeddings, the head and norms.
    groups = rankwise.parameter_groups(model, galore(rank=rank, every=20), lr=0.02, other_lr=0.005)
    return model, rankwise.Optimizer(groups, lr=0.02)


def main(smoke: bool, steps: int, rank: int) -> tuple[Any, Any]:
    """Train once without a stop and once with one; returns both models."""
    words, window, length = (SMALL, 64, 20_000) if smoke else (LARGER, 256, 400_000)
    tokenizer = rankwise.models.byte_tokenizer()
    ids = rankwise.models.tokens(tokenizer, rankwise.models.embedded_texts()["topics"][:length])
    if not smoke:  # what would fit into how much memory?
        print(rankwise.plan(words, 2**30, window=window).table())

    def train(folder: str | None, stop_at: int | None = None) -> Any:
        def observe(step: int, figures: Any) -> None:
            if step == stop_at:
                raise Stop

        model, optimizer = new_run(words, rank)
        report = rankwise.train(
            model,
            ids,
            optimizer,
            steps=steps,
            every=max(1, steps // 5),  # steps between two looks, each with a checkpoint
            layerwise=True,
            checkpoint=folder,
            observe=observe,
            window=window,
        )
        print(report.table())
        return model

    whole = train(None)
    with tempfile.TemporaryDirectory() as folder:
        try:
            train(folder, stop_at=steps // 2 + 1)
        except Stop:
            print("stopped; files:", [path.name for path in Path(folder).iterdir()])
        again = train(folder)
    pairs = zip(whole.parameters(), again.parameters(), strict=True)
    print("the same bits:", all(torch.equal(one, two) for one, two in pairs))
    print(repr(rankwise.models.generate(again, tokenizer, "The ", tokens=40)))
    return whole, again


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rank", type=int, default=8)
    given = parser.parse_args()
    main(given.smoke, given.steps, given.rank)
