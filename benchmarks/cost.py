"""What compressing costs beside what the text costs: plain forward and backward passes over the same tokens.

Both run in turns on the same pieces of text, so that they suffer the same disturbances. Reported: seconds for
plain forward-backward passes (gradients of all parameters, labels of the text), for the statistics of the method,
and for factorisation, allocation and the new matrices at keep 0.8.

    python benchmarks/cost.py --json benchmarks/results/cost.json
"""

import argparse
import json
import time
from pathlib import Path

import torch
from common import command, environment
from torch import nn

import rankwise
from rankwise.compressors import KroneckerFactoredSvd
from rankwise.core import labels
from rankwise.models import embedded_texts
from rankwise.models.texts import tokens as ids_of


def plain(model, ids):
    """Run one ordinary forward-backward pass over (b, t) ids and return the seconds it took."""
    start = time.perf_counter()
    logits = model(input_ids=ids, use_cache=False).logits.float()
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    model.zero_grad()
    return time.perf_counter() - start


def main():
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    model, tokenizer = rankwise.load(options.model, dtype=getattr(torch, options.dtype))
    ids = ids_of(tokenizer, embedded_texts()["topics"], limit=options.tokens)
    pieces = ids.view(-1, 4, 512)
    method = KroneckerFactoredSvd()
    passes = statistics = 0.0
    for piece in pieces:
        passes += plain(model, piece)
        found = rankwise.calibrate(model, method.needs, data=piece, labels=labels.sampled)
        statistics += found.seconds
    report = rankwise.compress(model, method, keep=0.8, data=found)
    rest = sum(value for key, value in report.totals["seconds"].items() if key != "statistics")
    figures = {
        "tokens": len(ids),
        "dtype": options.dtype,
        "forward_backward_seconds": passes,
        "statistics_seconds": statistics,
        "statistics_over_forward_backward": statistics / passes,
        "rest_seconds": rest,
        "total_seconds": statistics + rest,
        "bound_seconds": 3 * passes + 60,
        "peak_memory_bytes": report.totals["peak_memory_bytes"],
    }
    print(json.dumps(figures, indent=1))
    result = {"command": command(), "environment": environment(), **figures}
    Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
