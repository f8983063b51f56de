"""What is shown of adapters."""

from .common import head_of, load, table

SCORES = {
    "SST-2": "accuracy",
    "CoLA": "Matthews",
    "MRPC": "accuracy",
    "GSM8K": "nats a label",
    "Shakespeare": "nats a token",
}


def adapter_quality() -> list[str]:
    """What adapters learn with equal numbers to train."""
    found = load("adapter_quality")
    if found is None:
        return []
    lines = head_of("Adapters: what they learn with equal numbers to train", found)
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
        lines += head_of("Adapters: bytes beside peft's", memory)
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
        lines += head_of("Adapters: seconds of a training step beside peft's", steps)
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
        *head_of(
            "Memory of merging a LoRA into a sharded checkpoint, as a multiple of the largest tensor", found
        ),
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
    return [*head_of("Healing by an adapter that goes into the factors", found), *table(head, cells)]


def peft_interop() -> list[str]:
    """Files of PEFT in both directions."""
    found = load("peft_interop")
    if found is None:
        return []
    rows = found["rows"]
    lines = [
        *head_of("Adapters in PEFT's files, in both directions", found),
        f"{len(rows)} cases: tiny models with random adapters, written by one and read by the other. The",
        "difference is the largest of logits, in float32; keys are those that the reader misses or does",
        "not expect.",
        "",
    ]
    cells = []
    for direction, case in dict.fromkeys((row["direction"], row["case"]) for row in rows):
        each = [row for row in rows if (row["direction"], row["case"]) == (direction, case)]
        models = ", ".join(dict.fromkeys(row["model"] for row in each))
        difference = max(row["difference"] for row in each)
        keys = sum(len(row["missing"]) + len(row["unexpected"]) for row in each)
        cells.append([direction, case, models, f"{difference:.1g}", str(keys)])
    return lines + table(["direction", "case", "models", "difference", "keys"], cells)
