"""Whether the predicted loss change orders single-layer truncations as the measured one does.

One layer at a time is truncated to a few ranks and put back. Measured is KL(dense || compressed) on the last
tokens of CPython's help topics, which is what a second-order prediction of the model's own loss aims at. The
statistics come from the first tokens of the same text.

    python benchmarks/prediction.py --json benchmarks/results/prediction.json
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from common import command, environment

import rankwise
from rankwise.compressors import KroneckerFactoredSvd
from rankwise.core.surgery import replace, select, set_module
from rankwise.models import embedded_texts
from rankwise.models.texts import tokens as ids_of


def spearman(one, two):
    """Return the rank correlation of two lists without ties."""
    ranks = torch.stack([torch.tensor(values).argsort().argsort().double() for values in (one, two)])
    return float(torch.corrcoef(ranks)[0, 1])


def main():
    """Truncate, predict, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=8192, help="calibration")
    parser.add_argument("--eval-tokens", type=int, default=2048)
    parser.add_argument("--every", type=int, default=17, help="take every so manieth layer")
    parser.add_argument("--share", type=float, nargs="+", default=[0.1, 0.3, 0.6], help="of the full rank")
    options = parser.parse_args()
    model, tokenizer = rankwise.load(options.model, dtype=torch.float32)
    ids = ids_of(tokenizer, embedded_texts()["topics"])
    method = KroneckerFactoredSvd()
    statistics = rankwise.calibrate(model, method.needs, data=ids[: options.tokens], autocast=torch.bfloat16)
    dense, rows = copy.deepcopy(model), []
    for name, site in list(select(model).items())[:: options.every]:
        choices = method.choices(site.weight, statistics.of(name, method.needs))
        before = model.get_submodule(name)
        for share in options.share:
            index = max(int(share * min(site.weight.shape)), 1) - 1
            replace(model, site, choices.build(index))
            report = rankwise.evaluate(model, None, {"topics": ids[-options.eval_tokens :]}, dense=dense)
            set_module(model, name, before)
            rows.append(
                {
                    "name": name,
                    "rank": index + 1,
                    "predicted": float(choices.errors[index]),
                    "kl": report.rows[0]["kl"],
                }
            )
            print(rows[-1], flush=True)
    result = {
        "command": command(),
        "environment": environment(),
        "rank_correlation": spearman([r["predicted"] for r in rows], [r["kl"] for r in rows]),
        "median_kl_over_predicted": sorted(r["kl"] / r["predicted"] for r in rows)[len(rows) // 2],
        "rows": rows,
    }
    Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    print(result["rank_correlation"], result["median_kl_over_predicted"])


if __name__ == "__main__":
    with torch.no_grad():
        main()
