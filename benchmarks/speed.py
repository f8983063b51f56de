"""How fast a compressed model runs beside the dense one, in one interleaved run: prefill and decode tokens/s.

The method is the default one, calibrated on few tokens: speed depends on the ranks alone. Dense and one
compressed model take turns; medians over the rounds are reported, and their ratios. (More than two models
at a time would overflow oneDNN's cache of compiled shapes in bfloat16, which one model alone does not.)

    python benchmarks/speed.py --json benchmarks/results/speed.json
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from common import command, environment

import rankwise
from rankwise.compressors import KroneckerFactoredSvd
from rankwise.models import embedded_texts, sizes, speed
from rankwise.models.texts import tokens as ids_of


def main():
    """Compress copies of one model, and time them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    rows = []
    dense, tokenizer = rankwise.load(options.model, dtype=torch.float32)
    ids = ids_of(tokenizer, embedded_texts()["topics"], limit=4096)
    method = KroneckerFactoredSvd()
    statistics = rankwise.calibrate(dense, method.needs, data=ids[:2048])
    models = {"dense": dense}
    for keep in options.keep:
        for gauge in ("pivot", "factors"):
            name = f"{gauge} {keep}"
            models[name] = copy.deepcopy(dense)
            rankwise.compress(models[name], KroneckerFactoredSvd(gauge=gauge), keep=keep, data=statistics)
    for dtype in options.dtype:
        for model in models.values():
            model.to(getattr(torch, dtype))
        for name, model in models.items():
            if name == "dense":
                continue
            pair = {"dense": dense, name: model}
            figures = speed(pair, ids, prefill=options.prefill, decode=options.decode, repeats=options.rounds)
            found = figures[name]
            ratio = {key.replace("tokens_per_s", "ratio"): found[key] / figures["dense"][key] for key in found}
            macs = sizes(model)["macs_per_token"] / sizes(dense)["macs_per_token"]
            rows.append({"model": name, "dtype": dtype, **found, **ratio, "macs_ratio": macs})
            print(rows[-1], flush=True)
    result = {"command": command(), "environment": environment(), "rows": rows}
    Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
