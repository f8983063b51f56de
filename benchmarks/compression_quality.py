"""Which method loses how much at which size: perplexity of SmolLM2-135M after compression.

Every row is one compressed model: method, gauge, allocation, calibration data, keep; for each text the perplexity
and the gap in nats to the dense model on the same tokens. Rows are written as they are made; a second run of the
same command goes on. Texts: CPython's help topics and, with --data, wikitext2 valid and a C4 slice, each scored
on its last tokens (wikitext2: the first), windows of 1024. No calibration set holds a token that is scored.
Parts: the bars that the project is judged by, on all texts; the grid of methods, gauges and allocations; other
structures than truncations, and what is lost when an ingredient of pruning is left out; and calibration sets and
sizes. All but the first score fewer tokens, the grid and the last of the first two texts.

    python benchmarks/compression_quality.py --data DATA \
        --json benchmarks/results/compression_quality.json
"""

import argparse
import copy
import itertools
from pathlib import Path

import torch
from common import Remember, Rows, read, restoring, texts
from torch import Tensor

import rankwise
from rankwise import allocators, compressors
from rankwise.core import labels
from rankwise.models import embedded_texts, sample
from rankwise.models.texts import tokens as ids_of
from rankwise.training import portions

BASELINE = {"method": "WhitenedSvd", "gauge": "factors", "allocate": "uniform", "calibration": "topics"}
BEST = {"method": "KroneckerFactoredSvd", "gauge": "pivot", "allocate": "water_filling"}
PRUNED = {"method": "KroneckerFactoredPruning", "gauge": "", "allocate": "water_filling"}
METHODS = ("PlainSvd", "ActivationAwareSvd", "WhitenedSvd", "FisherSvd", "KroneckerFactoredSvd")
BOTH = {"method": "KroneckerFactoredSvd+KroneckerFactoredPruning", "gauge": "", "allocate": "water_filling"}
MIX = {"topics": 0.25, "wiki": 0.33, "c4": 0.25, "python": 0.17}


class Bench:
    """One dense model, its texts, and the statistics of one calibration set at a time."""

    def __init__(self, options):
        self.options = options
        self.model, self.tokenizer = rankwise.load(options.model, dtype=torch.float32)
        self.rows = Rows(Path(options.json))
        self.texts = {name: ids_of(self.tokenizer, text) for name, text in texts(options.data).items()}
        self.calibrated, self.statistics, self.remembered = None, None, {}

    def scored(self, part):
        """Return the tokens that a part scores."""
        n = self.options.eval_tokens if part == "bars" else self.options.grid_tokens
        names = list(self.texts) if part in ("bars", "structures") else list(self.texts)[:2]
        return {name: self.texts[name][:n] if name == "wikitext2" else self.texts[name][-n:] for name in names}

    def score(self, part, about=None, **key):
        """Evaluate the model as it stands and add the row with what is known about it, unless it is there."""
        if not self.rows.has(part=part, **key):
            report = rankwise.evaluate(self.model, self.tokenizer, self.scored(part))
            nats = {row["name"]: row["nats"] for row in report.rows}
            dense = nats if key["method"] == "dense" else self.rows.find(part=part, method="dense")["nats"]
            self.rows.add(
                part=part,
                **key,
                **(about or {}),
                scored_tokens={row["name"]: row["tokens"] for row in report.rows},
                nats=nats,
                gap={name: nats[name] - dense[name] for name in nats},
                perplexity={row["name"]: row["perplexity"] for row in report.rows},
                evaluation_seconds=report.totals["seconds"],
            )

    def calibration_ids(self, name: str, count: int) -> Tensor:
        """Return the first tokens of a calibration set."""
        if name == "self":
            return sample(copy.deepcopy(self.model).bfloat16(), tokens=count)
        folder = Path(self.options.data or ".") / "calib_mix"
        sources = {
            "topics": lambda: embedded_texts()["topics"],
            "python": lambda: embedded_texts()["python"],
            "wiki": lambda: read(folder / "wiki.utf8.xz"),
            "c4": lambda: read(folder / "c4.utf8.xz"),
        }
        shares = MIX if name == "mix" else {name: 1.0}
        parts = []
        for source, share in shares.items():
            ids = ids_of(self.tokenizer, sources[source]())
            size = round(count * share)
            if source in self.texts and size > len(ids) - self.options.eval_tokens:
                raise SystemExit(f"{size} calibration tokens of {source} would overlap with what is scored")
            parts.append(ids[:size])
        return torch.cat(parts)

    def unscored(self, name: str) -> Tensor:
        """Return all tokens of a text that no part scores."""
        return self.texts[name][: -self.options.eval_tokens]

    def calibrate(self, name: str, count: int):
        """Collect the statistics of all methods from one calibration set, once."""
        if self.calibrated != (name, count):
            self.statistics = None  # the old ones' memory is needed for the new ones
            self.remembered.clear()
            ids = self.calibration_ids(name, count)
            needs = [need for method in (*METHODS, "Lord") for need in getattr(compressors, method).needs]
            chosen = labels.given if name == "self" else labels.sampled
            cast = torch.bfloat16 if self.options.bfloat16 else None
            self.statistics = rankwise.calibrate(self.model, needs, data=ids, labels=chosen, autocast=cast)
            self.calibrated = name, count
        return self.statistics

    def compressed(
        self, part, *, method, gauge, allocate, calibration, tokens, keep, fields=None, sequential=None, heal=None
    ):
        """Compress the model, heal it for some seconds, score it, and put the dense layers back."""
        key = dict(
            method=method, gauge=gauge, allocate=allocate, calibration=calibration, tokens=tokens, keep=keep,
            fields=fields, sequential=sequential, heal=heal,
        )  # fmt: skip
        if self.rows.has(part=part, **key):
            return
        statistics = self.calibrate(calibration, tokens)
        settings = (fields or {}) | ({"gauge": gauge} if gauge else {})
        name = repr((method, settings))
        if name not in self.remembered:
            parts = [getattr(compressors, part)(**settings) for part in method.split("+")]
            whole = parts[0] if len(parts) == 1 else compressors.Mixed(methods=tuple(parts))
            self.remembered[name] = whole if "layers" in settings else Remember(whole)
        dense = copy.deepcopy(self.model) if heal else None
        with restoring(self.model):
            report = rankwise.compress(
                self.model, self.remembered[name], keep=keep, data=statistics,
                allocate=getattr(allocators, allocate), sequential=bool(sequential),
            )  # fmt: skip
            kinds = [row["kind"] for row in report.rows]
            about = {
                "kept": report.totals["keep"],
                "seconds": report.totals["seconds"],  # a method's first row holds its decompositions
                "left_dense": kinds.count("Dense"),
                "kinds": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
                "predicted_error": sum(row["predicted_error"] for row in report.rows),
                "threads": torch.get_num_threads(),
            }
            if heal:
                healed = rankwise.heal(
                    self.model, dense, data=portions([self.unscored(calibration)], 512), budget=heal,
                    autocast=torch.bfloat16,
                )  # fmt: skip
                about["healing"] = {
                    name: healed.totals[name] for name in ("steps", "rows", "held_out", "seconds")
                }
            self.score(part, about, **key)


def bars(options):
    """The comparison that the project is judged by."""
    for keep in (0.9, 0.8, 0.6):
        yield {**BASELINE, "tokens": 24576, "keep": keep}
        yield {**BEST, "calibration": "topics", "tokens": 24576, "keep": keep}
        yield {**PRUNED, "calibration": "topics", "tokens": 24576, "keep": keep}
    for about, keep in itertools.product((BEST, PRUNED), (0.8, 0.6)):
        yield {**about, "calibration": "topics", "tokens": 24576, "keep": keep, "sequential": True}
    for keep in (0.9, 0.8):
        yield {**BEST, "calibration": "self", "tokens": 24576, "keep": keep}
    for about, keep in ((PRUNED, 0.6), (BEST, 0.6), (PRUNED, 0.8), (BEST, 0.8)):
        yield {**about, "calibration": "topics", "tokens": 24576, "keep": keep, "heal": 600.0}


def grid(options):
    """Every method, gauge and allocation on one calibration set."""
    for method, gauge in itertools.product(METHODS, ("factors", "pivot")):
        for allocate, keep in itertools.product(("uniform", "water_filling"), options.keep):
            about = {"method": method, "gauge": gauge, "allocate": allocate}
            yield {**about, "calibration": "topics", "tokens": 24576, "keep": keep}


def structures(options):
    """Structures beside truncations, shared dictionaries, ranks in multiples, and pruning without an ingredient.

    Left out are, one at a time: the allocator (all layers get equal shares), and with equal shares the outputs'
    metric, all but the diagonal of the inputs', the search for places, and shrinkage.
    """
    about = {"calibration": "topics", "tokens": 24576}
    alike = {**PRUNED, "allocate": "uniform", **about}
    for keep in (0.6, 0.8, 0.5, 0.4):
        for each in (BASELINE, BEST):
            yield {**each, **about, "keep": keep}
        for method in ("OrthogonalDictionary", "CoSpaDi"):
            yield {**alike, "method": method, "keep": keep, "fields": {"share": keep}}
    left_out = (
        {},
        {"output_damping": 1e6},
        {"input_shrinkage": 0.999},
        {"steps": 1},
        {"input_shrinkage": 0.0},
    )
    for left in left_out:
        yield {**alike, "keep": 0.6, "fields": {"share": 0.6, **left}}
    for method, keep in itertools.product(("OrthogonalDictionary", "CoSpaDi"), (0.8, 0.6)):
        yield {**alike, "method": method, "keep": keep, "fields": {"share": keep, "layers": 2}}
    for keep in (0.8, 0.6):
        yield {**BASELINE, **about, "method": "Lord", "keep": keep}
        yield {**BEST, **about, "keep": keep, "fields": {"rank_multiple": 32}}
    for part in (0.6, 0.15):
        fields = {"share": 0.6, "sparse_share": part}
        yield {**alike, "method": "SparsePlusLowRank", "keep": 0.6, "fields": fields}
    for each, keep in itertools.product((PRUNED, BOTH), (0.6, 0.4)):
        yield {**each, **about, "keep": keep}


def calibration(options):
    """The best method under several calibration sets and sizes."""
    for name, count in itertools.product(("topics", "mix", "self"), options.tokens):
        for keep in (0.9, 0.8):
            yield {**BEST, "calibration": name, "tokens": count, "keep": keep}


PARTS = {
    "bars": bars,
    "grid": grid,
    "structures": structures,
    "calibration": calibration,
}


def main():
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="the result; an existing one is continued")
    parser.add_argument(
        "--data", help="folder with wikitext2/ and calib_mix/; without it, topics alone are scored"
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="default: all")
    parser.add_argument("--method", action="append", help="only rows of these methods; default: all")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5], help="of the grid")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 24576, 65536])
    parser.add_argument("--eval-tokens", type=int, default=16384, help="of each text, scored by the bars")
    parser.add_argument("--grid-tokens", type=int, default=4096, help="of each text, scored by the other parts")
    parser.add_argument("--bfloat16", action="store_true", help="calibration passes in bfloat16")
    options = parser.parse_args()
    bench = Bench(options)
    chosen = options.part or list(PARTS)
    for part in chosen:
        bench.score(part, method="dense")
    jobs = [(part, job) for part in chosen for job in PARTS[part](options)]
    jobs = [(part, job) for part, job in jobs if not options.method or job["method"] in options.method]
    sets = list(dict.fromkeys((job["calibration"], job["tokens"]) for _, job in jobs))
    for part, job in sorted(jobs, key=lambda each: sets.index((each[1]["calibration"], each[1]["tokens"]))):
        bench.compressed(part, **job)


if __name__ == "__main__":
    with torch.no_grad():
        main()
