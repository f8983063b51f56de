"""Which method loses how much at which number of bits a weight: integers beside each other at equal bytes.

Every row is SmolLM2-135M in bfloat16 with its decoder matrices replaced: bits a weight with scales, offsets and
bitmaps counted, and for each text the gap in nats to the dense model on the same tokens. What is stored is as
in bfloat16; statistics and losses are computed in float32, which is faster on processors that have no
instructions for bfloat16. The first rows have one width in all layers (rounding to nearest on the best range,
and GPTQ); the others spend a budget of bytes over layers. Calibrated on topics, or on the model's own samples,
for which every text is foreign. Rows are written as they are made; a second run of the same command goes on.

    python benchmarks/low_bit.py --data DATA --json benchmarks/results/low_bit.json
"""

import argparse
import copy
from pathlib import Path

import torch
from common import Remember, Rows, restoring, texts

import rankwise
from rankwise.allocators import uniform, water_filling
from rankwise.compressors import Gptq, KroneckerFactoredPruning, KroneckerFactoredRounding, Mixed
from rankwise.core import labels
from rankwise.models import sample
from rankwise.models.texts import tokens as ids_of


def fixed():
    """One width in all layers."""
    for bits, group in ((8, 128), (4, 32), (4, 128), (3, 128), (2, 64)):
        yield f"round to nearest, {bits} bits, group {group}", Gptq(bits=bits, group=group, feedback=False)
    for bits, group in ((4, 128), (3, 128), (2, 64)):
        yield f"GPTQ, {bits} bits, group {group}", Gptq(bits=bits, group=group)


def searched(options):
    """A budget over layers."""
    rounding = KroneckerFactoredRounding(group=options.group)
    yield f"KroneckerFactoredRounding, group {options.group}", Remember(rounding)
    if options.mixed:
        yield "Mixed: rounding and pruning", Remember(Mixed(methods=(rounding, KroneckerFactoredPruning())))


def main():
    """Run what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="the result; an existing one is continued")
    parser.add_argument("--data", help="folder with wikitext2/ and calib_mix/; without it, topics alone")
    parser.add_argument("--calibration", choices=("topics", "self"), default="topics")
    parser.add_argument("--calibration-tokens", type=int, default=24576)
    parser.add_argument("--eval-tokens", type=int, default=4096, help="of each text")
    parser.add_argument("--group", type=int, default=128, help="of the methods that spend a budget")
    parser.add_argument("--budget", type=float, nargs="+", default=[4.0, 3.0, 2.5], help="bits a weight")
    parser.add_argument("--mixed", action="store_true", help="let layers be pruned instead")
    parser.add_argument("--only", help="of the methods with one width: those whose name has this in it")
    options = parser.parse_args()
    rows = Rows(Path(options.json))
    model, tokenizer = rankwise.load("smollm2-135m", dtype=torch.bfloat16)
    ids = {name: ids_of(tokenizer, text) for name, text in texts(options.data).items()}
    n = options.eval_tokens
    scored = {name: each[:n] if name == "wikitext2" else each[-n:] for name, each in ids.items()}

    def score():
        wide = copy.deepcopy(model).float()
        return {row["name"]: row["nats"] for row in rankwise.evaluate(wide, tokenizer, scored).rows}

    if not rows.has(method="dense", arithmetic="float32"):
        rows.add(method="dense", arithmetic="float32", bits=16.0, nats=score())
    dense = rows.find(method="dense", arithmetic="float32")["nats"]
    own, count = options.calibration == "self", options.calibration_tokens
    wide = copy.deepcopy(model).float()
    data = sample(wide, tokens=count) if own else ids["topics"][:count]
    chosen = labels.given if own else labels.sampled
    statistics = rankwise.calibrate(wide, Gptq.needs, data=data, labels=chosen)
    del wide

    def row(name, method, keep, allocate):
        key = {"method": name, "calibration": options.calibration, "budget": keep * 16, "arithmetic": "float32"}
        if rows.has(**key):
            return
        with restoring(model):
            report = rankwise.compress(model, method, keep=keep, of="bytes", data=statistics, allocate=allocate)
            nats = score()
            rows.add(
                **key,
                bits=16 * report.totals["keep"]["bytes"],
                nats=nats,
                gap={text: nats[text] - dense[text] for text in nats},
                predicted_error=sum(r["predicted_error"] for r in report.rows),
                seconds=report.totals["seconds"],
                kinds={k: sum(r["kind"] == k for r in report.rows) for k in {r["kind"] for r in report.rows}},
            )

    for name, method in fixed():
        if options.only is None or options.only in name:
            row(name, method, 0.99, uniform)
    for name, method in searched(options):
        for bits in options.budget:
            row(name, method, bits / 16, water_filling)


if __name__ == "__main__":
    with torch.no_grad():
        main()
