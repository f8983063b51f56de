"""Write docs/results.md from the committed benchmark results: ``python docs/results.py``."""

import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
START, END = "<!-- results -->", "<!-- end of results -->"
RESULTS = ROOT / "benchmarks" / "results"


def load(name: str) -> dict | None:
    """Read a result, or return None if it is not committed."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Return a Markdown table."""
    return ["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows]] + [""]


PARTS = {
    "bars": "The default method beside SVD-LLM's whitening",
    "structures": "Other structures beside truncations",
    "grid": "Every method, gauge and allocation, calibrated on the same text",
    "calibration": "Calibration sets and sizes",
}
WHITENED = {"method": "WhitenedSvd", "gauge": "factors", "allocate": "uniform"}
PRUNED = {"method": "KroneckerFactoredPruning", "allocate": "water_filling", "sequential": None, "heal": None}
DEFAULT = {
    "method": "KroneckerFactoredSvd",
    "gauge": "pivot",
    "allocate": "water_filling",
    "sequential": None,
    "heal": None,
}


def find(rows: list[dict], **key: Any) -> dict | None:
    """Return the first row with these values."""
    return next((row for row in rows if all(row.get(k) == v for k, v in key.items())), None)


def find_all(rows: list[dict], **key: Any) -> list[dict]:
    """Return the rows with these values."""
    return [row for row in rows if all(row.get(k) == v for k, v in key.items())]


def quality() -> list[str]:
    """Perplexity after compression."""
    found = load("compression_quality")
    if found is None:
        return []
    lines = _head("Quality: perplexity after compression", found)
    lines += [
        "SmolLM2-135M-Instruct (from 4-bit weights), float32, all decoder matrices, windows of 1024.",
        "The gap is to the dense model, in nats per token; the last column divides it by that of `WhitenedSvd`",
        "with factors and uniform ranks (SVD-LLM's whitening), with the same keep and data.",
        "",
    ]
    for part, title in PARTS.items():
        rows = [row for row in found["rows"] if row["part"] == part]
        if len(rows) > 1:
            lines += _quality(title, rows)
    return lines


def _quality(title: str, rows: list[dict]) -> list[str]:
    dense, *compressed = rows
    names = list(dense["perplexity"])
    counts = ", ".join(f"{dense['scored_tokens'][n]} tokens of {n}" for n in names)
    cells = [["dense", "", "", "", "", *(f"{dense['perplexity'][n]:.2f}" for n in names), ""]]
    for row in compressed:
        rival = find(rows, **WHITENED, **{key: row[key] for key in ("calibration", "tokens", "keep")})
        ratio = ""
        if rival is not None and rival is not row:
            ratio = " / ".join(f"{row['gap'][n] / rival['gap'][n]:.3f}" for n in names)
        fields = "".join(f", {name}={value}" for name, value in (row.get("fields") or {}).items())
        allocate = row["allocate"] + (", sequential" if row.get("sequential") else "")
        allocate += f", healed {row['heal'] / 60:g} min" if row.get("heal") else ""
        about = [row["method"] + fields, row["gauge"], allocate, f"{row['calibration']} {row['tokens']}"]
        scores = [f"{row['perplexity'][n]:.2f} ({row['gap'][n]:+.3f})" for n in names]
        cells.append([*about, str(row["keep"]), *scores, ratio])
    head = ["method", "gauge", "allocation", "calibration", "keep", *(f"{n} (gap)" for n in names), "gap ratio"]
    return [f"### {title}", "", f"Scored: {counts}.", "", *table(head, cells)]


TITLES = {
    "whitened SVD, factors, uniform": WHITENED,
    "rankwise default": DEFAULT,
    "rankwise default, sequential": {**DEFAULT, "sequential": True},
    "rankwise default, healed 10 min": {**DEFAULT, "heal": 600.0},
    "rankwise pruned": PRUNED,
    "rankwise pruned, sequential": {**PRUNED, "sequential": True},
    "rankwise pruned, healed 10 min": {**PRUNED, "heal": 600.0},
}


def summary() -> str:
    """Return the table that README shows: the best method beside whitening."""
    found = load("compression_quality")
    if found is None:
        return ""
    bars = [row for row in found["rows"] if row["part"] == "bars"]
    names = list(bars[0]["perplexity"])
    rows = [["dense", "1.0", "", *(f"{bars[0]['perplexity'][n]:.2f}" for n in names)]]
    for calibration, keep in (("topics", 0.9), ("topics", 0.8), ("topics", 0.6), ("self", 0.9), ("self", 0.8)):
        for title, wanted in TITLES.items():
            row = find(bars, **wanted, calibration=calibration, keep=keep)
            if row is not None:
                rows.append([title, str(keep), calibration, *(f"{row['perplexity'][n]:.2f}" for n in names)])
    return "\n".join(table(["", "keep", "calibrated on", *names], rows))


def damping() -> list[str]:
    """How the regularisers were chosen."""
    found = load("damping")
    if found is None:
        return []
    names = list(found["rows"][0]["gap"])
    head = ["keep", "input_shrinkage", "output_damping", *names]
    rows = [
        [
            str(r["keep"]),
            str(r["input_shrinkage"]),
            str(r["output_damping"]),
            *(f"{r['gap'][n]:.3f}" for n in names),
        ]
        for r in found["rows"]
    ]
    lines = _head("How the default method's regularisers were chosen", found)
    lines += [
        "Gap to the dense model in nats, calibrated on movie reviews, on texts that no other table reports.",
        "",
    ]
    return lines + table(head, rows)


def prediction() -> list[str]:
    """How far predicted errors can be trusted."""
    found = load("prediction")
    if found is None:
        return []
    lines = _head("Predicted loss change beside the measured one, one layer truncated at a time", found)
    lines += [
        f"Rank correlation {found['rank_correlation']:.3f} over {len(found['rows'])} truncations; in the median",
        f"the measured change is {found['median_kl_over_predicted']:.2f} times the predicted one.",
        "",
    ]
    head = ["layer", "rank", "predicted (nats)", "measured KL (nats)"]
    rows = [[r["name"], str(r["rank"]), f"{r['predicted']:.2e}", f"{r['kl']:.2e}"] for r in found["rows"]]
    return lines + table(head, rows)


def low_bit() -> list[str]:
    """Integers at equal bytes."""
    found = load("low_bit")
    if found is None:
        return []
    dense, *rows = found["rows"]
    names = list(dense["nats"])
    head = ["method", "calibration", "bits a weight", *names]
    cells = [
        [r["method"], r["calibration"], f"{r['bits']:.2f}", *(f"{r['gap'][n]:+.4f}" for n in names)] for r in rows
    ]
    lines = _head("Bits a weight: gap to the dense model in nats", found)
    lines += [
        "Scales, offsets and bitmaps counted. The model's weights come from 4-bit blocks",
        "of 32: grids that divide these blocks fit it better than they would fit other models.",
        "",
    ]
    return lines + table(head, cells)


def speed() -> list[str]:
    """Tokens a second."""
    found = load("speed")
    if found is None:
        return []
    rows = [
        [
            r["model"],
            r["dtype"],
            f"{r['macs_ratio']:.2f}",
            f"{r['prefill_ratio']:.2f}",
            f"{r['decode_ratio']:.2f}",
            f"{r['prefill_tokens_per_s']:.0f}",
            f"{r['decode_tokens_per_s']:.1f}",
        ]
        for r in found["rows"]
    ]
    head = [
        "model",
        "type",
        "multiply-adds / dense",
        "prefill / dense",
        "decode / dense",
        "prefill tok/s",
        "decode tok/s",
    ]
    return _head("Speed, dense and compressed taking turns", found) + table(head, rows)


def cost() -> list[str]:
    """What compressing costs."""
    found = load("cost")
    if found is None:
        return []
    keys = ["tokens", "dtype", "forward_backward_seconds", "statistics_seconds", "rest_seconds", "total_seconds"]
    keys += ["bound_seconds", "peak_memory_bytes"]
    cells = [f"{found[k]:.1f}" if isinstance(found[k], float) else str(found[k]) for k in keys]
    lines = _head("Cost of compressing", found)
    return [
        *lines,
        "Bound: three plain forward-backward passes over the same text plus 60 s.",
        "",
        *table(keys, [cells]),
    ]


def narrow() -> list[str]:
    """Ordinary models with fewer neurons and heads."""
    found, others = load("narrow"), load("compression_quality")
    if found is None:
        return []
    lines = _head("Narrower ordinary models: fewer neurons and heads", found)
    dense, *rows = [row for row in found["rows"] if row["part"] == "quality"]
    names = list(dense["perplexity"])
    beside = [] if others is None else [row for row in others["rows"] if row["part"] == "bars"]
    counts = ", ".join(f"{dense['scored_tokens'][n]} tokens of {n}" for n in names)
    lines += [
        f"`rankwise.narrow`, calibrated on topics. Scored: {counts}.",
        "The other rows are those of the first table, scored on more tokens of the same texts: smaller files,",
        "but no ordinary models. The gap to the dense model is in nats, as is the predicted rise of the loss.",
        "",
    ]
    cells = [["dense", "1.0", "", *(f"{dense['perplexity'][n]:.2f}" for n in names), ""]]
    for row in rows:
        cells.append(["narrow", *_narrow(row, names), f"{row['predicted_error']:.3f}"])
        for title, wanted in TITLES.items():
            rival = find(beside, **wanted, calibration="topics", tokens=row["tokens"], keep=row["keep"])
            if rival is not None:
                cells.append([title, *_narrow(rival, names), ""])
    lines += table(["", "keep", "widths", *(f"{n} (gap)" for n in names), "predicted"], cells)
    rows = [row for row in found["rows"] if row["part"] == "ingredients" and "keep" in row]
    if rows:
        lines += ["What each ingredient gives, on the MLPs alone:", ""]
        cells = [[row["method"], *_narrow(row, names)] for row in rows]
        lines += table(["", "keep", "widths", *(f"{n} (gap)" for n in names)], cells)
    rows = [row for row in found["rows"] if row["part"] == "speed"]
    keys = ("macs_ratio", "prefill_ratio", "decode_ratio")
    cells = [[str(row["keep"]), row["dtype"], *(f"{row[key]:.2f}" for key in keys)] for row in rows]
    head = ["keep", "type", "multiply-adds / dense", "prefill / dense", "decode / dense"]
    return lines + (["Speed, dense and narrow taking turns:", "", *table(head, cells)] if rows else [])


def _narrow(row: dict, names: list[str]) -> list[str]:
    widths = ", ".join(f"{name} {after}" for name, (_, after) in row.get("widths", {}).items())
    return [str(row["keep"]), widths, *(f"{row['perplexity'][n]:.2f} ({row['gap'][n]:+.3f})" for n in names)]


def streaming() -> list[str]:
    """Memory of a streamed compression, and whether kills change its result."""
    found = load("streaming")
    if found is None:
        return []
    gib, same = 2**30, "the same bits as" if found["bit_identical"] else "other bits than"
    cells = [
        [name, str(run["killed"]), f"{run['wall_seconds']:.0f}", f"{run['peak_memory_bytes'] / gib:.2f}"]
        for name, run in [("whole", found["uninterrupted"]), *[("again", run) for run in found["killed"]]]
    ]
    return [
        *_head("A checkpoint streamed block by block", found),
        f"A random Llama of {found['blocks']} blocks and {found['total_bytes'] / gib:.2f} GiB in bfloat16, "
        f"{found['tokens']} tokens; embeddings, head and three blocks take "
        f"{found['embeddings_and_3_blocks_bytes'] / gib:.2f} GiB. The layers compressed are those of "
        f"`{found['layers']}`. The run that was killed made {same} the one that was not.",
        "",
        *table(["run", "killed", "seconds", "peak GiB of the process"], cells),
    ]


def state_bytes() -> list[str]:
    """Bytes of optimisers' states, and published savings."""
    found = load("state_bytes")
    if found is None:
        return []
    rows = [row for row in found["rows"] if row["part"] == "state"]
    sizes, methods = (list(dict.fromkeys(row[key] for row in rows)) for key in ("size", "method"))
    same = [row["predicted"] == row["measured"] for row in rows if "measured" in row]
    measured = next(row["size"] for row in rows if "measured" in row)
    lines = _head("Bytes of optimisers' states", found)
    lines += [
        "GB predicted from shapes, for Llamas in bfloat16 with GaLore's ranks; moments are float32 unless they",
        f"have fewer bits. For {measured} the bytes after a step are the predicted ones in {sum(same)} of "
        f"{len(same)} cases. Embeddings and head are counted, with AdamW.",
        "",
    ]
    cells = []
    for method in methods:
        each = [find(rows, method=method, size=size) for size in sizes]
        cells.append([method, *(f"{row['predicted'] / 1e9:.3f}" if row else "" for row in each)])
    lines += table(["method", *sizes], cells)
    claims = [row for row in found["rows"] if row["part"] == "claim"]
    lines += [f"Published savings beside counted ones, for {sizes[-1]}, against AdamW with all in bfloat16:", ""]
    cells = [[r["method"], f"{r['claimed']:.1%}", f"{r['counted']:.1%}", r["how"]] for r in claims]
    lines += table(["what", "published", "counted", "counted how"], cells)
    lines += ["Weights and states together; Q-GaLore's published figures are recalled:", ""]
    both = [row for row in found["rows"] if row["part"] == "table"]
    cells = [
        [
            r["size"],
            r["method"],
            str(r["claimed"] or ""),
            f"{r['counted'] / 1e9:.2f}",
            f"{r['counted'] / 2**30:.2f}",
        ]
        for r in both
    ]
    return lines + table(["size", "method", "published (G)", "GB", "GiB"], cells)


def adapter_quality() -> list[str]:
    """What adapters learn with equal numbers to train."""
    found = load("adapter_quality")
    if found is None:
        return []
    lines = _head("Adapters: what they learn with equal numbers to train", found)
    lines += [
        "Mean and range over three seeds at the method's own best learning rate; see the script for the search.",
        "The loss early is that of texts kept aside after a quarter of the steps; bytes are those of gradients,",
        "optimiser and activations; seconds are of a busy machine and say little.",
        "",
    ]
    chosen = [row for row in found["rows"] if row.get("chosen")]
    for task in dict.fromkeys(row["task"] for row in chosen):
        cells = []
        for method in dict.fromkeys(row["method"] for row in chosen if row["task"] == task):
            rows = [row for row in chosen if (row["task"], row["method"]) == (task, method)]
            cells.append([method, *_learned(rows)])
        head = ["method", "numbers", "learning rate", SCORES[task], "loss early", "loss aside", "MB", "seconds"]
        lines += [f"### {task}", "", *table(head, cells)]
    return lines


SCORES = {
    "SST-2": "accuracy",
    "CoLA": "Matthews",
    "MRPC": "accuracy",
    "GSM8K": "nats a label",
    "Shakespeare": "nats a token",
}


def _learned(rows: list[dict]) -> list[str]:
    failed = [row for row in rows if "failed" in row]
    if failed:
        return ["", f"{failed[0]['lr']:g}", f"{len(failed)} of {len(rows)} failed", *[""] * 4]
    scores = [row["score"] for row in rows]
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in ("select", "training_bytes", "seconds")}
    early = sum(row["looks"][1] for row in rows) / len(rows)
    spread = f"{sum(scores) / len(scores):.3f} ({min(scores):.3f} ... {max(scores):.3f})"
    numbers = [f"{rows[0]['trained']:,}", f"{rows[0]['lr']:g}", spread]
    megabytes = f"{mean['training_bytes'] / 1e6:.0f}"
    return [*numbers, f"{early:.3f}", f"{mean['select']:.3f}", megabytes, f"{mean['seconds']:.0f}"]


def adapter_cost() -> list[str]:
    """Bytes and seconds of adapters beside peft's."""
    lines = []
    memory, steps = load("adapter_memory"), load("adapter_speed")
    if memory is not None:
        lines += _head("Adapters: bytes beside peft's", memory)
        lines += [
            "Bytes kept for the backward pass; and the most that one layer of a width needs for a moment.",
            "",
        ]
        keys = ("saved", "temporary_512", "temporary_1024")
        cells = []
        for row in memory["rows"]:
            pairs = [[row[_of(key, maker)] for maker in ("rankwise", "peft")] for key in keys]
            cells.append([row["method"], *(f"{a:,} / {b:,} = {a / b:.2f}" for a, b in pairs)])
        lines += table(["method", "saved", "temporary, width 512", "temporary, width 1024"], cells)
    if steps is not None:
        lines += _head("Adapters: seconds of a training step beside peft's", steps)
        cells = []
        for row in steps["rows"]:
            low, _, high = row["quartiles"]
            ours, theirs = row["saved_bytes"]["rankwise"], row["saved_bytes"]["peft"]
            saved = f"{ours / 1e6:.0f} / {theirs / 1e6:.0f} = {ours / theirs:.2f}"
            seconds = [f"{row['median_seconds'][maker]:.2f}" for maker in ("rankwise", "peft")]
            cells.append([row["method"], *seconds, f"{row['ratio']:.2f} ({low:.2f} ... {high:.2f})", saved])
        lines += table(["method", "rankwise", "peft", "ratio: median (quartiles)", "MB kept"], cells)
    return lines


def _of(key: str, maker: str) -> str:
    first, *rest = key.split("_")
    return "_".join([first, maker, *rest])


def merge_memory() -> list[str]:
    """Memory of merging an adapter into a checkpoint."""
    found = load("merge_memory")
    if found is None:
        return []
    cells = []
    for row in found["rows"]:
        about = [row["largest_is"], row["dtype"], f"{row['bytes'] / 1e9:.2f}", f"{row['largest'] / 1e6:.0f}"]
        for tool in ("rankwise", "peft"):
            about += [f"{row[tool]['times_largest']:.2f}", f"{row[tool]['seconds']:.0f}"]
        cells.append([*about, f"{row['difference']:.1g}", f"{row['change']:.2g}"])
    head = ["largest tensor", "type", "GB in all", "MB of it", "rankwise / it", "s", "peft / it", "s"]
    return [
        *_head("Memory of merging a LoRA into a sharded checkpoint, as a multiple of the largest tensor", found),
        f"Rank {found['rank']} on all linear layers, peft {found['environment']['peft']}. The memory is the most",
        "that the process holds over the most that it holds for a tiny model, the adapter's own included. The",
        "seconds were taken on a busy machine. The last columns are the largest difference of a tensor between",
        "the two results, and the largest change by the merge, relative to the tensor.",
        "",
        *table([*head, "difference", "change"], cells),
    ]


def heal_adapter() -> list[str]:
    """An adapter on a compressed model, put into its factors."""
    found = load("heal_adapter")
    if found is None:
        return []
    dense, *rows = found["rows"]
    names = list(dense["perplexity"])
    cells = [
        ["dense", "", f"{dense['params'] / 1e6:.1f}", "", "", *(f"{dense['perplexity'][n]:.2f}" for n in names)]
    ]
    for row in rows:
        way = row["way"] + (", absorbed" if row.get("absorbed") else "")
        trained = f"{row['healing']['trained'] / 1e6:.1f}" if "healing" in row else ""
        steps = str(row["healing"]["steps"]) if "healing" in row else ""
        lost = f"{row['lost']['mean']:.3f}" if "lost" in row else ""
        scores = [f"{row['perplexity'][n]:.2f} ({row['gap'][n]:+.3f})" for n in names]
        cells.append([way, trained, f"{row['params'] / 1e6:.1f}", steps, lost, *scores])
    head = ["", "million trained", "million stored", "steps", "lost by absorbing", *(f"{n} (gap)" for n in names)]
    return [*_head("Healing by an adapter that goes into the factors", found), *table(head, cells)]


def optimizer_speed() -> list[str]:
    """What a projected optimiser costs."""
    found = load("optimizer_speed")
    if found is None:
        return []
    lines = _head("Projected optimisers: refreshes and steps beside galore-torch", found)
    rows = [row for row in found["rows"] if row["part"] == "refresh"]
    cells = [
        [r["optimizer"], f"{r['power']:g}", f"{r['seconds']:.3f}", f"{r['ratio']:.3f}", f"{r['of_svd']:.4f}"]
        for r in rows
    ]
    lines += [
        f"One refresh of a basis of rank {rows[0]['rank']} for {rows[0]['m']} x {rows[0]['n']}, of gradients "
        "that drift and whose singular values fall as this power of their number; the energy held is divided by "
        "what the SVD holds.",
        "",
        *table(["basis", "power", "seconds", "seconds / galore-torch", "energy / SVD"], cells),
        "Steps between refreshes, and over refreshes on the layers of a small Llama; the first step, which finds "
        "all bases, apart.",
        "",
    ]
    rows = [row for row in found["rows"] if row["part"] in ("step", "stalls")]
    keys = ("first", "median", "ratio", "max_over_median")
    cells = [
        [r["part"], r["optimizer"], str(r["matrices"]), str(r["steps"]), *(f"{r[key]:.2f}" for key in keys)]
        for r in rows
    ]
    head = [
        "",
        "optimiser",
        "matrices",
        "steps",
        "first (s)",
        "median (s)",
        "median / galore-torch",
        "max / median",
    ]
    return lines + table(head, cells)


def orthogonal() -> list[str]:
    """Orthogonal starts and constraints in a deep network."""
    found = load("orthogonal")
    if found is None:
        return []
    runs = [row for row in found["rows"] if row["part"] == "run"]
    tried = sorted({row["lr"] for row in found["rows"] if row["part"] == "tuning"})
    seeds, steps = len({row["seed"] for row in runs}), runs[0]["steps"]
    lines = [
        *_head(f"Orthogonal weights in a tanh network of {runs[0]['depth']} layers", found),
        "Digits of 8 x 8 points, width 64, SGD with momentum 0.9; variances at the start are the critical ones",
        f"of mean-field theory. Means over {seeds} seeds, after {steps} steps; the learning rate is each way's",
        f"best of {', '.join(f'{each:g}' for each in tried)} for another seed. `reached` is the step at which",
        "the mean training loss of ten batches is below 0.3, a seed each; milliseconds are of a busy machine.",
        "",
    ]
    cells, curves = [], []
    for way in dict.fromkeys(row["way"] for row in runs):
        rows = [row for row in runs if row["way"] == way]
        reached = ", ".join(str(row["reached"] or "-") for row in rows)
        scores = [_mean([row[key] for row in rows]) for key in ("loss", "test_loss", "accuracy")]
        gaps = f"{max(row['gap'] for row in rows):.1g}"
        milliseconds = f"{1000 * sum(row['seconds_a_step'] for row in rows) / seeds:.0f}"
        cells.append([way, f"{rows[0]['lr']:g}", reached, *scores, gaps, milliseconds])
        for step in rows[0]["spectra"]:
            seen = [row["spectra"][step] for row in rows]
            ranges = [_range([each[key] for each in seen]) for key in ("largest", "median", "fisher")]
            curves.append([way, step, *ranges])
    head = ["way", "learning rate", "reached", "training loss", "test loss", "accuracy"]
    lines += table([*head, "max of W'W / s^2 - I", "ms a step"], cells)
    lines += [
        "Singular values of the hidden layers' Jacobian, means over four digits, and the largest eigenvalue of",
        "the Fisher information; ranges over the seeds:",
        "",
    ]
    return lines + table(["way", "step", "largest singular value", "median", "Fisher"], curves)


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.3f}" if len(known) == len(values) else "diverged"


def _range(values: list[float]) -> str:
    return f"{min(values):.3g} ... {max(values):.3g}"


def target_projection() -> list[str]:
    """Training without back-propagation."""
    found = load("target_projection")
    if found is None:
        return []
    lines = _head("Target projection and feedback alignment beside back-propagation", found)
    lines += [
        "Small networks, 8,000 of MNIST's 10,000 test images learned from and the others scored; mean and range",
        "over three seeds at the best of three learning rates of Adam, and of two gains of targets. Random",
        "features are hidden layers that stay as drawn. Kept are the most bytes that graphs hold at one time in",
        "a step of 128 images, without the images. Seconds are of a busy machine and say little.",
        "",
    ]
    rows = [row for row in found["rows"] if row["part"] == "accuracy"]
    cells = []
    for net, method in dict.fromkeys((row["net"], row["method"]) for row in rows):
        each = [row for row in rows if (row["net"], row["method"]) == (net, method)]
        exact = [row for row in rows if (row["net"], row["method"]) == (net, "back-propagation")]
        mean, best = (sum(row["accuracy"] for row in some) / len(some) for some in (each, exact))
        low, high = (choose(row["accuracy"] for row in each) for choose in (min, max))
        seconds = sum(row["seconds"] for row in each) / len(each)
        spread = f"{mean:.1%} ({low:.1%} ... {high:.1%})"
        setting = f"{each[0]['lr']:g}" + (f", {each[0]['gain']:g}" if each[0]["gain"] else "")
        kept, points = f"{each[0]['kept_bytes'] / 1e3:,.0f}", f"{100 * (mean - best):+.1f}"
        cells.append([net, method, setting, spread, points, kept, f"{seconds:.0f}"])
    lines += table(["", "method", "learning rate, gain", "accuracy", "points", "kB kept", "seconds"], cells)
    rows = [row for row in found["rows"] if row["part"] == "depth"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    cells = []
    for depth in dict.fromkeys(row["depth"] for row in rows):
        each = [found for m in methods if (found := find(rows, depth=depth, method=m))]
        numbers = [f"{row['accuracy']:.1%}, {row['kept_bytes'] / 1e3:,.0f}" for row in each]
        cells.append([str(depth), *numbers])
    lines += ["The MLP with more hidden layers, one seed, half the epochs: accuracy, and kB kept.", ""]
    return lines + table(["hidden layers", *methods], cells)


def exchange_bytes() -> list[str]:
    """What processes exchange for a step."""
    found = load("exchange_bytes")
    if found is None:
        return []
    rows = found["rows"]
    lines = [
        *_head("Several processes: bytes that a step exchanges", found),
        f"Bytes of a process, divided by those of all gradients, which DistributedDataParallel exchanges; rank "
        f"{rows[0]['rank']}, smaller sides of {rows[0]['smaller_side']}. Replicas exchange gradients by "
        "`rankwise.Replicated`; shards are rows of DTensors, whose gradients FSDP2 has exchanged before. A "
        "steady step is one in which no basis is due, the mean is over a period. The difference is that to one "
        "process, over the largest change of a parameter.",
        "",
    ]
    cells = [
        [
            row["kind"],
            str(row["world"]),
            row["method"],
            *(f"{row[key] / row['ddp']:.3f}" for key in ("first", "steady", "mean")),
            f"{row['difference']:.1g}",
            "yes" if row["alike"] else "no",
        ]
        for row in rows
    ]
    head = ["", "processes", "optimiser", "first step", "steady", "mean", "difference", "same bits in all"]
    return lines + table(head, cells)


def gradient_error() -> list[str]:
    """Natural gradients from few rows beside those of all."""
    found = load("gradient_error")
    if found is None:
        return []
    rows = [row for row in found["rows"] if row["method"] != "reduced"]
    ranks, tasks = ([*dict.fromkeys(row[key] for row in rows)] for key in ("rank", "task"))
    lines = _head("Natural gradients from few samples, beside those of all", found)
    lines += [
        "Relative error (cosine) by the share of the samples that HyLo keeps, the network at the beginning, in",
        "the middle and late in its training, in float64. What is left out is `over_damping` of `HyLo.neglected`",
        "at a share of 0.1, of the layer where it is largest: far above one no low rank can work.",
        "",
    ]
    for task in tasks:
        cells = []
        for row in find_all(rows, task=task, rank=ranks[0]):
            key = {name: row[name] for name in ("task", "phase", "damping", "method")}
            each = [find(rows, **key, rank=rank) for rank in ranks]
            shown = [f"{r['error']:.3f} ({r['cosine']:.3f})" if r else "" for r in each]
            over = (find(rows, **key, rank=0.1) or row)["over"]
            about = [row["phase"], f"{row['loss']:.2f}", f"{row['damping']:g}", row["method"]]
            cells.append([*about, "" if over is None else f"{over:.2f}", *shown])
        head = ["phase", "loss", "damping", "method", "left out", *map(str, ranks)]
        lines += [f"### {task}", "", *table(head, cells)]
        cells = [
            [row["phase"], f"{row['damping']:g}", f"{row['error']:.3f} ({row['cosine']:.3f})"]
            for row in find_all(found["rows"], task=task, method="reduced")
            if row["error"] > 1e-9
        ]
        if cells:
            lines += ["What one product for all positions of a sample (`reduced`) changes, with all samples:", ""]
            lines += table(["phase", "damping", "error (cosine)"], cells)
    return lines


def second_order() -> list[str]:
    """What second-order methods reach, and when."""
    found = load("second_order")
    if found is None:
        return []
    lines = _head("Second-order methods: steps, epochs and seconds to a score", found)
    lines += [
        "Each at its own best place after as many trials, three seeds, trainings taking turns step by step.",
        "Scores are better the lower they are, and the target is the worst that SGD with momentum has at an end;",
        "steps, epochs and seconds are medians over the runs that get there. Learning rates of our second-order",
        "methods are multiples of the damping. Phases are shares of the seconds of a training; what is left are",
        "the forward and the backward pass and the optimiser.",
        "",
    ]
    final = [row for row in found["rows"] if row.get("chosen")]
    names = dict.fromkeys(row["method"] for row in found["rows"])
    keys = ("task", "images", "width", "batch", "steps", "every", "device")
    for case in dict.fromkeys(tuple(row[key] for key in keys) for row in final):
        mine = [row for row in final if tuple(row[key] for key in keys) == case]
        about = ", ".join(f"{key} {value}" for key, value in zip(keys[1:], case[1:], strict=True))
        goal = f"; target {mine[0]['target']:.4f}" if "target" in mine[0] else ""
        each = {name: [row for row in mine if row["method"] == name] for name in names}
        cells = [[name, *_reached(rows)] for name, rows in each.items() if rows]
        head = [
            "method",
            "rate, damping",
            "end: mean (range)",
            "there",
            "steps",
            "epochs",
            "seconds",
            "ms a step",
        ]
        lines += [f"### {case[0]}", "", f"{about}{goal}.", ""]
        lines += table([*head, "MB of state", *(f"{name} %" for name in PHASES)], cells)
    rows = [row for row in found["rows"] if row["part"] == "exchange"]
    if rows:
        lines += ["### Bytes between processes", "", "MB that one of them gives or gets for each inversion.", ""]
        cells = []
        for row in rows:
            looks = row["steps"] / row["every"]
            sizes = [row["phases"].get(name, {"bytes": 0})["bytes"] / looks / 1e6 for name in SENT]
            about = [row["task"], str(row["width"]), str(row["batch"]), str(row["processes"]), row["method"]]
            cells.append([*about, *(f"{size:.3f}" for size in sizes), f"{row['gradients'] / 1e6:.3f}"])
        head = ["task", "width", "batch", "processes", "method", *SENT, "the gradients, each step"]
        lines += table(head, cells)
    return lines


PHASES = ("factorise", "exchange", "invert", "broadcast", "apply")
SENT = ("exchange", "broadcast")


def _reached(rows: list[dict]) -> list[str]:
    ends = [row["looks"][-1][4] for row in rows]
    there = [row["reached"] for row in rows if row.get("reached")]
    medians = [f"{statistics.median(values):.4g}" for values in zip(*there, strict=True)] or [""] * 3
    place = ", ".join(f"{10**x:.2g}" for x in rows[0]["place"])
    end = f"{statistics.fmean(ends):.4f} ({min(ends):.4f} ... {max(ends):.4f})"
    total = sum(row["seconds"] for row in rows)
    shares = [sum(row["phases"].get(name, {"seconds": 0})["seconds"] for row in rows) / total for name in PHASES]
    step = statistics.median(row["step_ms"] for row in rows)
    about = [place, end, f"{len(there)} of {len(rows)}", *medians, f"{step:.1f}", f"{rows[0]['state'] / 1e6:.2f}"]
    return [*about, *(f"{share:.0%}" if share else "" for share in shares)]


def curvature_cost() -> list[str]:
    """What curvature costs a layer."""
    found = load("curvature_cost")
    if found is None:
        return []
    lines = _head("Second-order methods: what curvature costs a layer", found)
    lines += [
        "Seconds to factorise and invert and to apply, methods taking turns, and MB that a process gives to the",
        "others; formulas count multiplications and numbers, see the script. Ratios are to kfac-pytorch. On a",
        "busy machine seconds are no more than what ratios are made of.",
        "",
    ]
    for part in dict.fromkeys(row["part"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["part"] == part]
        head = ["layer", "batch", "method", "refresh (s)", "ratio", "apply (s)", "exchange (MB)", "ratio"]
        head += ["broadcast (MB)", "multiplications / kfac-pytorch", "numbers / kfac-pytorch"]
        lines += [f"### {part}", "", *table(head, [_cost(row, rows) for row in rows])]
        if "ResNet" in part:
            lines += _network(rows)
    return lines


LAYER = ("inputs", "outputs", "kernel", "side", "stride", "batch")


def _rival(row: dict, rows: list[dict]) -> dict | None:
    return find(rows, method="kfac-pytorch", **{key: row[key] for key in LAYER})


def _refresh(row: dict, key: str = "seconds") -> float:
    return row[key]["factorise"] + row[key]["invert"]


def _cost(row: dict, rows: list[dict]) -> list[str]:
    patch = f", {row['kernel']} x {row['kernel']}, {row['side']} x {row['side']} places" if row["kernel"] else ""
    about = [f"{row['inputs']} to {row['outputs']}{patch}", str(row["batch"]), row["method"]]
    if "skipped" in row:
        return [*about, row["skipped"], *[""] * 7]
    rival = _rival(row, rows)
    ratios = [""] * 4
    if rival is not None and "seconds" in rival:
        pairs = [(_refresh(each), each["bytes"]["exchange"]) for each in (row, rival)]
        sums = [(_refresh(each, "flops"), each["floats"]) for each in (row, rival)]
        ratios = [f"{a / b:.3g}" for both in (pairs, sums) for a, b in zip(*both, strict=True)]
    sizes = [f"{row['bytes'][name] / 1e6:.3f}" for name in SENT]
    seconds = [f"{_refresh(row):.4f}", ratios[0], f"{row['seconds']['apply']:.4f}"]
    return [*about, *seconds, sizes[0], ratios[1], sizes[1], *ratios[2:]]


def _network(rows: list[dict]) -> list[str]:
    """Sums over the layers of a network that every method was timed on."""
    skipped = [[row[key] for key in LAYER] for row in rows if "skipped" in row]
    timed = [row for row in rows if [row[key] for key in LAYER] not in skipped]
    cells, first = [], None
    for method in dict.fromkeys(row["method"] for row in timed):
        mine = [row for row in timed if row["method"] == method]
        sums = [sum(row["count"] * _refresh(row) for row in mine)]
        sums += [sum(row["count"] * row["seconds"]["apply"] for row in mine)]
        sums += [sum(row["count"] * row["bytes"][name] for row in mine) / 1e6 for name in SENT]
        first = first or sums
        cells.append([method, *(f"{a:.3f} ({b / a:.3g} x less)" for a, b in zip(sums, first, strict=True))])
    count = sum(row["count"] for row in timed if row["method"] == timed[0]["method"])
    head = ["method", "refresh (s)", "apply (s)", "exchange (MB)", "broadcast (MB)"]
    return [
        f"All {count} layers of these that every method was timed on, beside kfac-pytorch:",
        "",
        *table(head, cells),
    ]


def mfac_pruning() -> list[str]:
    """A convolutional network pruned by curvatures."""
    found = load("mfac_pruning")
    if found is None:
        return []
    dense, *rows = found["rows"]
    about = rows[0]
    lines = _head("Pruning by M-FAC: a ResNet-20 on CIFAR-10 (JPEG)", found)
    lines += [
        f"{about['keep']:.0%} of the weights kept, by the gradients of {about['gradients']} batches of "
        f"{about['images']} images; then {about['steps']} steps of SGD with {about['batch']} images, the same "
        f"for all. Accuracy on test images, mean and range over seeds; that of the dense network is "
        f"{dense['before']:.3f}.",
        "",
    ]
    cells = []
    for method in dict.fromkeys(row["method"] for row in rows):
        each = [row for row in rows if row["method"] == method]
        scores = [[row[key] for row in each] for key in ("before", "after")]
        spread = [f"{sum(s) / len(s):.3f} ({min(s):.3f} ... {max(s):.3f})" for s in scores]
        norms = "still" if each[0]["still"] else "of the batch"
        cells.append([method, str(each[0]["rounds"]), str(len(each)), f"{each[0]['lr']:g}", norms, *spread])
    head = ["method", "rounds", "seeds", "learning rate", "norms", "before training", "after training"]
    return lines + table(head, cells)


def _head(title: str, found: dict) -> list[str]:
    about = found["environment"]
    made = f"torch {about['torch']}, {about['threads']} threads, commit {about['commit']}"
    return [f"## {title}", "", f"`{found['command']}` ({made})", ""]


def page() -> str:
    """Return the whole page."""
    lines = ["# Results", "", "Generated from `benchmarks/results/*.json` by `python docs/results.py`.", ""]
    parts = (quality, narrow, low_bit, damping, prediction, speed, cost, streaming)
    parts += (
        second_order,
        curvature_cost,
        optimizer_speed,
        exchange_bytes,
        adapter_quality,
        adapter_cost,
        heal_adapter,
        merge_memory,
    )
    parts += (state_bytes, orthogonal, target_projection, gradient_error, mfac_pruning)
    return "\n".join([*lines, *(line for part in parts for line in part())]).rstrip() + "\n"


def readme() -> str:
    """Return README with the table in its place."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, rest = text.split(START)
    return before + START + "\n" + summary() + END + rest.split(END)[1]


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
    (ROOT / "docs" / "results.md").write_text(page(), encoding="utf-8")
