"""Write docs/results.md from the committed benchmark results: ``python docs/results.py``."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
START, END = "<!-- results -->", "<!-- end of results -->"
sys.path.insert(0, str(ROOT / "docs"))

from sections.adapters import adapter_cost, adapter_quality, heal_adapter, merge_memory, peft_interop  # noqa: E402
from sections.compression import (  # noqa: E402
    cost,
    damping,
    low_bit,
    mfac_pruning,
    narrow,
    prediction,
    quality,
    speed,
    streaming,
    summary,
)
from sections.optimizers import (  # noqa: E402
    exchange_bytes,
    lipschitz,
    optimizer_speed,
    optimizer_training,
    orthogonal,
    state_bytes,
    target_projection,
)
from sections.second_order import curvature_cost, gradient_error, second_order  # noqa: E402


def page() -> str:
    """Return the whole page."""
    lines = ["# Results", "", "Generated from `benchmarks/results/*.json` by `python docs/results.py`.", ""]
    parts = (quality, narrow, low_bit, damping, prediction, speed, cost, streaming, mfac_pruning)
    parts += (adapter_quality, adapter_cost, heal_adapter, merge_memory, peft_interop)
    parts += (
        optimizer_training,
        optimizer_speed,
        exchange_bytes,
        state_bytes,
        orthogonal,
        lipschitz,
        target_projection,
    )
    parts += (second_order, curvature_cost, gradient_error)
    return "\n".join([*lines, *(line for part in parts for line in part())]).rstrip() + "\n"


def readme() -> str:
    """Return README with the table in its place."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, rest = text.split(START)
    return before + START + "\n" + summary() + END + rest.split(END)[1]


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
    (ROOT / "docs" / "results.md").write_text(page(), encoding="utf-8")
