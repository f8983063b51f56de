"""How fast a compressed model runs beside the dense one, in one interleaved run: prefill and decode tokens/s.

Each structure at each size, calibrated on few tokens and fitted in few steps: speed depends on sizes alone. Dense
and one compressed model take turns; medians over the rounds are reported, and their ratios. (More than two models
at a time would overflow oneDNN's cache of compiled shapes in bfloat16, which one model alone does not.)

    python benchmarks/speed.py --json benchmarks/results/speed.json
"""

import argparse
import copy
from pathlib import Path

import torch
from common import Rows

import rankwise
from rankwise.allocators import uniform, water_filling
from rankwise.compressors import Gptq, KroneckerFactoredPruning, KroneckerFactoredSvd, OrthogonalDictionary
from rankwise.models import embedded_texts, sizes, speed
from rankwise.models.texts import tokens as ids_of


def structures(keep):
    """Name, method and allocator of each."""
    yield f"pivot {keep}", KroneckerFactoredSvd(), water_filling
    yield f"pivot, ranks by 32, {keep}", KroneckerFactoredSvd(rank_multiple=32), water_filling
    yield f"factors {keep}", KroneckerFactoredSvd(gauge="factors"), water_filling
    yield f"sparse {keep}", KroneckerFactoredPruning(share=keep, steps=1, solves=1), uniform
    yield f"sparse dictionary {keep}", OrthogonalDictionary(share=keep, steps=1), uniform


def main():
    """Compress copies of one model, and time them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="the result; an existing one is continued")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows = Rows(Path(options.json))
    dense, tokenizer = rankwise.load(options.model, dtype=torch.float32)
    ids = ids_of(tokenizer, embedded_texts()["topics"], limit=4096)
    statistics = rankwise.calibrate(dense, KroneckerFactoredSvd.needs, data=ids[:2048])
    jobs = [(*each, {"keep": keep}) for keep in options.keep for each in structures(keep)]
    jobs.append(("4 bits", Gptq(bits=4, group=128, feedback=False), uniform, {"keep": 0.99, "of": "bytes"}))
    for name, method, allocate, budget in jobs:
        wanted = [dtype for dtype in options.dtype if not rows.has(model=name, dtype=dtype)]
        if not wanted:
            continue
        model = copy.deepcopy(dense).float()
        rankwise.compress(model, method, data=statistics, allocate=allocate, **budget)
        for dtype in wanted:
            pair = {each: m.to(getattr(torch, dtype)) for each, m in (("dense", dense), (name, model))}
            figures = speed(pair, ids, prefill=options.prefill, decode=options.decode, repeats=options.rounds)
            found = figures[name]
            ratio = {key.replace("tokens_per_s", "ratio"): found[key] / figures["dense"][key] for key in found}
            macs = sizes(model)["macs_per_token"] / sizes(dense)["macs_per_token"]
            rows.add(model=name, dtype=dtype, **found, **ratio, macs_ratio=macs)
        dense.float()


if __name__ == "__main__":
    main()
