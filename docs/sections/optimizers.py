"""What is shown of optimisers and of gradients from elsewhere."""

import math
import statistics

from .common import find, head_of, load, table


def optimizer_speed() -> list[str]:
    """What a projected optimiser costs."""
    found = load("optimizer_speed")
    if found is None:
        return []
    lines = head_of("Projected optimisers: refreshes and steps beside galore-torch", found)
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
        "all bases, apart. With 42 matrices, each step counts as the median of three equal runs.",
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
    return [*lines, *table(head, cells), *_compiled([row for row in found["rows"] if row["part"] == "compiled"])]


def _compiled(rows: list[dict]) -> list[str]:
    """Steps with and without a compiler."""
    if not rows:
        return []
    cells = [[r["optimizer"], f"{r['first']:.1f}", f"{r['median']:.3f}", f"{r['ratio']:.2f}"] for r in rows]
    return [
        f"Steps of {rows[0]['matrices']} such matrices with `Optimizer(compiled=True)` and without; GaLore of "
        f"rank {rows[0]['rank']} between two refreshes.",
        "",
        *table(["optimiser", "first (s)", "median (s)", "median / torch AdamW"], cells),
    ]


def optimizer_training() -> list[str]:
    """Losses with equal tokens."""
    found = load("optimizer_training")
    if found is None:
        return []
    lines = head_of("Optimisers beside each other: loss after equal tokens", found)
    lines += [
        "Llamas of bytes on articles of Wikipedia; hidden matrices get the method, with rank a quarter of the",
        "side, all else AdamW. Five trials of the rate, chosen on other articles; nats a byte on yet others,",
        "mean and standard deviation over seeds, and the mean's distance to AdamW's. State is of all parameters;",
        "milliseconds are those of the optimiser's own step, the median and the longest, on a busy machine.",
        "",
    ]
    for size, steps in dict.fromkeys((row["size"], row["steps"]) for row in found["rows"]):
        rows = [row for row in found["rows"] if (row["size"], row["steps"]) == (size, steps)]
        chosen = {method: _chosen(rows, method) for method in dict.fromkeys(row["method"] for row in rows)}
        chosen = {method: each for method, each in chosen.items() if each}
        first = statistics.fmean(row["held_out"] for row in chosen["AdamW"])
        cells = []
        for method, each in chosen.items():
            losses = [row["held_out"] for row in each]
            mean, spread = statistics.fmean(losses), statistics.stdev(losses)
            other = statistics.fmean(row["wikitext2"] for row in each)
            times = (f"{statistics.median(row[key] for row in each):.1f}" for key in ("step_ms", "most_ms"))
            cells.append(
                [
                    method,
                    f"{each[0]['lr']:.2g}",
                    f"{mean:.4f} ± {spread:.4f}",
                    f"{mean / first - 1:+.1%}",
                    f"{other:.4f}",
                    f"{each[0]['state'] / 1e6:.2f}",
                    *times,
                ]
            )
        numbers = f"{rows[0]['parameters']:,} numbers, {steps} steps of 1024 bytes, {len(chosen['AdamW'])} seeds."
        head = ["method", "learning rate", "loss", "to AdamW", "wikitext2", "state (MB)", "step (ms)", "longest"]
        lines += [numbers, "", *table(head, cells)]
    return lines


def _chosen(rows: list[dict], method: str) -> list[dict]:
    """Return a method's trainings at the rate that its trials chose; none while seeds are missing."""
    own = [row for row in rows if row["method"] == method and row["choose"] is not None]
    best = min((row for row in own if row["seed"] == 0), key=lambda row: row["choose"], default=None)
    each = [row for row in own if best and (row["lr"], row["rest_lr"]) == (best["lr"], best["rest_lr"])]
    return each if len(each) == 3 else []


def exchange_bytes() -> list[str]:
    """What processes exchange for a step."""
    found = load("exchange_bytes")
    if found is None:
        return []
    rows = found["rows"]
    lines = [
        *head_of("Several processes: bytes that a step exchanges", found),
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


def state_bytes() -> list[str]:
    """Bytes of optimisers' states, and published savings."""
    found = load("state_bytes")
    if found is None:
        return []
    rows = [row for row in found["rows"] if row["part"] == "state"]
    sizes, methods = (list(dict.fromkeys(row[key] for row in rows)) for key in ("size", "method"))
    same = [row["predicted"] == row["measured"] for row in rows if "measured" in row]
    measured = next(row["size"] for row in rows if "measured" in row)
    lines = head_of("Bytes of optimisers' states", found)
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


def orthogonal() -> list[str]:
    """Orthogonal starts and constraints in a deep network."""
    found = load("orthogonal")
    if found is None:
        return []
    runs = [row for row in found["rows"] if row["part"] == "run"]
    tried = sorted({row["lr"] for row in found["rows"] if row["part"] == "tuning"})
    seeds, steps = len({row["seed"] for row in runs}), runs[0]["steps"]
    lines = [
        *head_of(f"Orthogonal weights in a tanh network of {runs[0]['depth']} layers", found),
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
    lines = head_of("Target projection and feedback alignment beside back-propagation", found)
    lines += [
        "Small networks on MNIST's 10,000 test images: 6,000 learned from, 2,000 choose the settings, 2,000 are",
        "scored; mean and range over three seeds. Each method has 16 trials of Adam's learning rate and, where",
        "there is one, its gain. Random features are hidden layers that stay as drawn. Kept are the most bytes",
        "that graphs hold at one time in a step of 128 images, without the images.",
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


def lipschitz() -> list[str]:
    """Bounded networks, what they cost, and whether their certificates hold."""
    found = load("lipschitz")
    if found is None:
        return []
    rows = found["rows"]
    lines = [
        *head_of("Networks with a certificate: loss, bound, and the worst pair that was found", found),
        "A Transformer of characters without norms, and the certificate of all of it behind the tables of",
        f"characters and places, in root mean squares of rows. {rows[0]['pairs']:,} pairs for each network are",
        "driven apart by gradient ascent, from texts and from random rows, in float64.",
        "",
    ]
    cells = [
        [
            row["name"],
            "" if row["limit"] is None else f"{row['limit']:g}",
            f"{row['held_out_loss']:.3f}",
            f"{row['accuracy']:.3f}",
            f"{row['largest_norm']:.4g}",
            f"{row['log10_bound']:.2f}",
            f"{math.log10(row['worst_ratio']):.2f}",
            f"{row['passed']} of {row['pairs']:,}",
        ]
        for row in rows
    ]
    head = ["constraint", "limit", "held-out loss", "accuracy", "largest norm", "log10 of the bound"]
    return lines + table([*head, "log10 of the worst ratio", "pairs above the bound"], cells)
