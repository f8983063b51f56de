"""How the default method's two regularisers were chosen: on texts that no other benchmark reports.

Calibration: the first 24k tokens of movie reviews. Scored: other movie reviews, Shakespeare, and arithmetic word
problems, 4k tokens each, at one keep. Every row is one setting; the gap is in nats to the dense model.

    python benchmarks/damping.py --data DATA --json benchmarks/results/damping.json
"""

import argparse
import itertools
import zipfile
from pathlib import Path

import torch
from common import Rows, read

import rankwise
from rankwise.compressors import KroneckerFactoredSvd
from rankwise.core import labels
from rankwise.core.surgery import select, set_module
from rankwise.models.texts import tokens as ids_of


def main():
    """Measure a grid of settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True)
    parser.add_argument("--data", required=True, help="folder with nltk_text, tinyshakespeare and gsm8k")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8])
    parser.add_argument("--shrinkage", type=float, nargs="+", default=[0.0, 0.03, 0.1])
    parser.add_argument("--damping", type=float, nargs="+", default=[1e-3, 0.05, 0.2])
    parser.add_argument("--eval-tokens", type=int, default=4096)
    options = parser.parse_args()
    data, n = Path(options.data), options.eval_tokens
    model, tokenizer = rankwise.load(options.model, dtype=torch.float32)
    with zipfile.ZipFile(data / "nltk_text" / "movie_reviews.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".txt"))
        reviews = "\n".join(archive.read(name).decode("utf-8", "replace") for name in names[::20])
    plain = {
        "shakespeare": read(data / "tinyshakespeare" / "input.txt.xz"),
        "gsm8k": read(data / "gsm8k" / "train.jsonl.xz"),
    }
    ids = ids_of(tokenizer, reviews)
    scored = {"reviews": ids[-n:], **{name: ids_of(tokenizer, text)[:n] for name, text in plain.items()}}
    rows = Rows(Path(options.json))

    def nats():
        return {row["name"]: row["nats"] for row in rankwise.evaluate(model, tokenizer, scored).rows}

    dense = nats()
    statistics = rankwise.calibrate(
        model, KroneckerFactoredSvd.needs, data=ids[:24576], labels=labels.sampled, autocast=torch.bfloat16
    )
    before = {path: model.get_submodule(path) for site in select(model).values() for path in site.names}
    for keep, shrinkage, damping in itertools.product(options.keep, options.shrinkage, options.damping):
        key = {"keep": keep, "input_shrinkage": shrinkage, "output_damping": damping}
        if rows.has(**key):
            continue
        method = KroneckerFactoredSvd(input_shrinkage=shrinkage, output_damping=damping)
        rankwise.compress(model, method, keep=keep, data=statistics)
        found = nats()
        rows.add(**key, gap={name: found[name] - dense[name] for name in found})
        for path, layer in before.items():
            set_module(model, path, layer)


if __name__ == "__main__":
    with torch.no_grad():
        main()
