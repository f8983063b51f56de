"""Healing a compressed model by an adapter that is then put into the factors without growth.

SmolLM2-135M, compressed by the default method to 0.8 of its decoder matrices, is healed for ten minutes towards
the dense model, by its stored numbers, by an adapter on the factors (:class:`rankwise.adapters.FactorLora`), and
by one beside the matrices (:class:`rankwise.adapters.Lora`), each from the same start and on the same text.
Adapters are scored as trained and once :func:`rankwise.absorb` has put them into the factors: exactly, or as the
best matrices of the old ranks in the metric of the loss. Texts are scored as in compression_quality.py; none of
them is healed on. Rows are written as they are made; a second run of the same command goes on.

    python benchmarks/heal_adapter.py --data DATA --json benchmarks/results/heal_adapter.json
"""

import argparse
import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import Rows
from compression_quality import Bench

import rankwise
from rankwise.adapters import FactorLora, Lora
from rankwise.compressors import KroneckerFactoredSvd
from rankwise.training import portions

METHOD = KroneckerFactoredSvd()
ADAPTERS = {"adapter on the factors": FactorLora, "adapter beside the matrices": Lora}
WAYS = ("stored numbers", *ADAPTERS)


def tiny(options: argparse.Namespace) -> Any:
    """Return a random model with random text in the place of a :class:`Bench`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    ids = torch.randint(64, (6 * 1024,))
    scored, unscored = ids[-1024:], ids[:-1024]
    return SimpleNamespace(
        model=model,
        tokenizer=None,
        scored=lambda part: {"random": scored},
        unscored=lambda name: unscored,
        calibration_ids=lambda name, count: unscored[:count],
        rows=Rows(Path(options.json)),
    )


class Healing:
    """One compressed model, healed in several ways."""

    def __init__(self, bench: Any, options: argparse.Namespace) -> None:
        self.bench, self.options = bench, options
        self.ids = bench.calibration_ids("topics", options.tokens)
        self.texts = bench.scored("bars")
        self.data = portions([bench.unscored("topics")], 512)

    def score(self, model: Any, way: str, **about: Any) -> None:
        """Evaluate a model on the texts, and add the row."""
        report = rankwise.evaluate(model, self.bench.tokenizer, self.texts)
        nats = {row["name"]: row["nats"] for row in report.rows}
        dense = nats if way == "dense" else self.bench.rows.find(way="dense")["nats"]
        perplexity = {row["name"]: row["perplexity"] for row in report.rows}
        gap = {name: nats[name] - dense[name] for name in nats}
        self.bench.rows.add(way=way, **about, nats=nats, gap=gap, perplexity=perplexity)

    def compressed(self) -> Any:
        """Return the compressed model."""
        model = copy.deepcopy(self.bench.model)
        rankwise.compress(model, METHOD, keep=self.options.keep, data=self.ids)
        return model

    def healed(self, model: Any, lr: float) -> dict[str, Any]:
        """Train in place; return what a row says of it."""
        report = rankwise.heal(
            model, self.bench.model, data=self.data, budget=self.options.seconds, lr=lr, autocast=torch.bfloat16
        )
        told = ("trained", "steps", "rows", "held_out", "seconds")
        return {"lr": lr, **{name: report.totals[name] for name in told}}

    def by_adapter(self, way: str, start: Any, method: Lora | FactorLora) -> None:
        """Heal by an adapter, and score it as trained and absorbed."""
        rows, model = self.bench.rows, copy.deepcopy(start)
        if rows.has(way=way, absorbed=True):
            return
        rankwise.adapt(model, method)
        healing = self.healed(model, self.options.adapter_lr) | {"rank": method.rank}
        if not rows.has(way=way, absorbed=False):
            self.score(model, way, absorbed=False, healing=healing, params=model.num_parameters())
        report = rankwise.absorb(model, METHOD, data=self.ids)
        lost = [row["lost"] for row in report.rows]
        about = {"lost": {"mean": sum(lost) / len(lost), "most": max(lost)}, "params": model.num_parameters()}
        self.score(model, way, absorbed=True, healing=healing, **about)

    def run(self) -> None:
        """Make all rows that are missing."""
        rows = self.bench.rows
        if not rows.has(way="dense"):
            self.score(self.bench.model, "dense", params=self.bench.model.num_parameters())
        start = self.compressed()
        if not rows.has(way="compressed"):
            self.score(start, "compressed", keep=self.options.keep, params=start.num_parameters())
        for way in self.options.way or WAYS:
            if way in ADAPTERS:
                self.by_adapter(way, start, ADAPTERS[way](rank=self.options.rank))
            elif not rows.has(way=way):
                model = copy.deepcopy(start)
                healing = self.healed(model, self.options.lr)
                self.score(model, way, healing=healing, params=model.num_parameters())


def main() -> None:
    """Heal in all ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="the result; an existing one is continued")
    parser.add_argument("--data", help="folder with wikitext2/; without it, topics alone are scored")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--tokens", type=int, default=24576, help="of the calibration")
    parser.add_argument("--eval-tokens", type=int, default=16384, help="of each text")
    parser.add_argument("--way", action="append", choices=WAYS, help="of healing; default: all")
    parser.add_argument("--seconds", type=float, default=600.0, help="of each healing")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-5, help="for stored numbers")
    parser.add_argument("--adapter-lr", type=float, default=5e-4)
    parser.add_argument("--smoke", action="store_true", help="a random model, in seconds")
    options = parser.parse_args()
    if options.smoke:
        options.tokens, options.seconds, options.rank = 1024, 4.0, 4
    Healing(tiny(options) if options.smoke else Bench(options), options).run()


if __name__ == "__main__":
    main()
