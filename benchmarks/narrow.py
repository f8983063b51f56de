"""What narrower ordinary models lose, and how fast they are: SmolLM2-135M with fewer neurons and heads.

Texts, calibration and scored tokens are those of the structures in compression_quality.py. Parts: quality at
several sizes; what each ingredient gives, on the MLPs alone (neurons in the order of ridge leverage scores, as
MoDeGPT has it, or with S = I, and the refit left out); and speed beside the dense model, taking turns. Rows are
written as they are made; a second run of the same command goes on.

    python benchmarks/narrow.py --data DATA --json benchmarks/results/narrow.json
"""

import argparse
import copy
from unittest import mock

import torch
from compression_quality import Bench

import rankwise
from rankwise import linalg, narrowing
from rankwise.compressors import KroneckerFactoredSvd
from rankwise.core import labels
from rankwise.linalg import Metric
from rankwise.models import sizes, speed


def in_mlp(name, module):
    """Select the matrices of the MLPs."""
    return ".mlp." in name


def by_leverage(weight, outputs, inputs, *, size, least):
    """Order neurons by ridge leverage scores, diag(C (C + mean(diag C) I)^-1), least first; predict nothing."""
    moment = inputs.damped
    ridge = moment + moment.diagonal().mean() * torch.eye(len(moment))
    scores = torch.linalg.solve(ridge, moment).diagonal()
    return scores.argsort()[: len(scores) - least], torch.zeros(len(scores) - least + 1, dtype=torch.float64)


def without_outputs(weight, outputs, inputs, **options):
    """Order neurons as usual, but with S = I."""
    return linalg.eliminate_columns(weight, Metric(), inputs, **options)


def as_they_are(weight, inputs, kept):
    """Leave the other columns as they are."""
    return weight.double()[:, kept]


ERRORS = ("predicted", "measured")
USUAL = {"eliminate_columns": linalg.eliminate_columns, "refit_columns": linalg.refit_columns}
INGREDIENTS = {
    "all": {},
    "S = I": {"eliminate_columns": without_outputs},
    "leverage scores": {"eliminate_columns": by_leverage},
    "no refit": {"refit_columns": as_they_are},
}


class Narrow(Bench):
    """One dense model, its texts, and the statistics of the matrices that read neurons and heads."""

    def scored(self, part):
        """Return the tokens that the structures are scored on."""
        return super().scored("structures")

    def narrowed(self, keep, where=None):
        """Return a narrow copy of the model, and the report."""
        if self.statistics is None:
            consumers = narrowing.find_widths(self.model, narrowing.select(self.model), torch.arange(32)[None])
            names = {name for width in consumers for name in width.blocks}
            self.statistics = rankwise.calibrate(
                self.model, KroneckerFactoredSvd.needs, data=self.calibration_ids("topics", self.options.tokens),
                where=lambda name, _: name in names, labels=labels.sampled,
                autocast=torch.bfloat16 if self.options.bfloat16 else None,
            )  # fmt: skip
        model = copy.deepcopy(self.model)
        return model, rankwise.narrow(model, keep=keep, data=self.statistics, where=where)

    def quality(self, part, name, keep, where=None):
        """Narrow the model, score it, and put the dense one back."""
        key = {"method": name, "calibration": "topics", "tokens": self.options.tokens, "keep": keep}
        if self.rows.has(part=part, **key):
            return
        dense = self.model
        try:
            self.model, report = self.narrowed(keep, where)
            about = {name: report.totals[name] for name in ("keep", "widths", "seconds")}
            errors = {f"{name}_error": sum(row[f"{name}_error"] for row in report.rows) for name in ERRORS}
            self.score(part, {"kept": about.pop("keep"), **about, **errors}, **key)
        finally:
            self.model = dense

    def speed(self, keep, dtype):
        """Time a narrow model and the dense one, taking turns."""
        if self.rows.has(part="speed", keep=keep, dtype=dtype):
            return
        kind = getattr(torch, dtype)
        pair = {"dense": copy.deepcopy(self.model).to(kind), "narrow": self.narrowed(keep)[0].to(kind)}
        figures = speed(pair, self.texts["topics"], prefill=512, decode=32, repeats=self.options.rounds)
        found = figures["narrow"]
        ratio = {key.replace("tokens_per_s", "ratio"): found[key] / figures["dense"][key] for key in found}
        macs = sizes(pair["narrow"])["macs_per_token"] / sizes(pair["dense"])["macs_per_token"]
        self.rows.add(part="speed", keep=keep, dtype=dtype, **found, **ratio, macs_ratio=macs)


def main():
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="the result; an existing one is continued")
    parser.add_argument("--data", help="folder with wikitext2/ and calib_mix/; without it, topics alone")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.8, 0.6])
    parser.add_argument("--tokens", type=int, default=24576, help="of topics, to calibrate with")
    parser.add_argument("--grid-tokens", type=int, default=4096, help="of each text, scored")
    parser.add_argument("--eval-tokens", type=int, default=16384, help="of each text, kept out of calibration")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bfloat16", action="store_true", help="the calibration pass in bfloat16")
    options = parser.parse_args()
    bench = Narrow(options)
    bench.score("quality", method="dense")
    for keep in options.keep:
        bench.quality("quality", "narrow", keep)
    for keep in options.keep:
        for dtype in ("float32", "bfloat16"):
            bench.speed(keep, dtype)
    bench.score("ingredients", method="dense")
    for name, changes in INGREDIENTS.items():
        with mock.patch.multiple(narrowing, **{**USUAL, **changes}):
            bench.quality("ingredients", name, 0.8, in_mlp)


if __name__ == "__main__":
    with torch.no_grad():
        main()
