"""What is shown of compression."""

from .common import find, head_of, load, table

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
TITLES = {
    "whitened SVD, factors, uniform": WHITENED,
    "rankwise default": DEFAULT,
    "rankwise default, sequential": {**DEFAULT, "sequential": True},
    "rankwise default, healed 10 min": {**DEFAULT, "heal": 600.0},
    "rankwise pruned": PRUNED,
    "rankwise pruned, sequential": {**PRUNED, "sequential": True},
    "rankwise pruned, healed 10 min": {**PRUNED, "heal": 600.0},
}


def quality() -> list[str]:
    """Perplexity after compression."""
    found = load("compression_quality")
    if found is None:
        return []
    lines = head_of("Quality: perplexity after compression", found)
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
    lines = head_of("How the default method's regularisers were chosen", found)
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
    lines = head_of("Predicted loss change beside the measured one, one layer truncated at a time", found)
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
    rows = [r for r in found["rows"] if r["method"] != "dense"]
    names = list(rows[0]["gap"])
    head = ["method", "calibration", "computed in", "bits a weight", *names]
    cells = [
        [
            r["method"],
            r["calibration"],
            r["arithmetic"],
            f"{r['bits']:.2f}",
            *(f"{r['gap'][n]:+.4f}" for n in names),
        ]
        for r in rows
    ]
    lines = head_of("Bits a weight: gap to the dense model in nats", found)
    lines += [
        "Scales, offsets and bitmaps counted. The model's weights come from 4-bit blocks",
        "of 32: grids that divide these blocks fit it better than they would fit other models.",
        "Losses computed in bfloat16, of the dense model too, are off by some thousandths of a nat.",
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
    return head_of("Speed, dense and compressed taking turns", found) + table(head, rows)


def cost() -> list[str]:
    """What compressing costs."""
    found = load("cost")
    if found is None:
        return []
    keys = ["tokens", "dtype", "forward_backward_seconds", "statistics_seconds", "rest_seconds", "total_seconds"]
    keys += ["bound_seconds", "peak_memory_bytes"]
    cells = [f"{found[k]:.1f}" if isinstance(found[k], float) else str(found[k]) for k in keys]
    lines = head_of("Cost of compressing", found)
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
    lines = head_of("Narrower ordinary models: fewer neurons and heads", found)
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
    which = "all" if found["layers"] == "." else f"those named `{found['layers']}`"
    cells = [
        [name, str(run["killed"]), f"{run['wall_seconds']:.0f}", f"{run['peak_memory_bytes'] / gib:.2f}"]
        for name, run in [("whole", found["uninterrupted"]), *[("again", run) for run in found["killed"]]]
    ]
    return [
        *head_of("A checkpoint streamed block by block", found),
        f"A random Llama of {found['blocks']} blocks and {found['total_bytes'] / gib:.2f} GiB in bfloat16, "
        f"{found['tokens']} tokens; embeddings, head and three blocks take "
        f"{found['embeddings_and_3_blocks_bytes'] / gib:.2f} GiB. Of the blocks' linear layers {which} are "
        f"compressed. The run that was killed made {same} the one that was not.",
        "",
        *table(["run", "killed", "seconds", "peak GiB of the process"], cells),
    ]


def mfac_pruning() -> list[str]:
    """A convolutional network pruned by curvatures."""
    found = load("mfac_pruning")
    if found is None:
        return []
    dense, *rows = found["rows"]
    about = rows[0]
    lines = head_of("Pruning by M-FAC: a ResNet-20 on CIFAR-10 (JPEG)", found)
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
