"""What is shown of second-order methods."""

import statistics

from .common import find, find_all, head_of, load, table

PHASES = ("factorise", "exchange", "invert", "broadcast", "apply")
SENT = ("exchange", "broadcast")
LAYER = ("inputs", "outputs", "kernel", "side", "stride", "batch")


def gradient_error() -> list[str]:
    """Natural gradients from few rows beside those of all."""
    found = load("gradient_error")
    if found is None:
        return []
    rows = [row for row in found["rows"] if row["method"] != "reduced"]
    ranks, tasks = ([*dict.fromkeys(row[key] for row in rows)] for key in ("rank", "task"))
    lines = head_of("Natural gradients from few samples, beside those of all", found)
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
    lines = head_of("Second-order methods: steps, epochs and seconds to a score", found)
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
    lines = head_of("Second-order methods: what curvature costs a layer", found)
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
