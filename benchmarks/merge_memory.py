"""How much memory it takes to merge an adapter into a sharded checkpoint, beside peft's merge_and_unload.

A random Llama of about 1 GB in several files, and a LoRA of rank 16 on all linear layers, in PEFT's files, which
both tools read. The largest tensor is the tied embedding, which has no adapter, or a matrix that has one. Each
merge is a process of its own, ours the command line; counted is the most that it holds over the most that the
same process holds for a tiny model. All files are removed afterwards.

    python benchmarks/merge_memory.py --json benchmarks/results/merge_memory.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import command, environment

WIDE = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "tie_word_embeddings": True}
SHAPES: dict[str, dict[str, int]] = {
    "embedding": {"intermediate_size": 5632, "vocab_size": 32000},
    "adapted matrix": {"intermediate_size": 16384, "vocab_size": 8000},
}
LAYERS = {("embedding", "bfloat16"): 10, ("embedding", "float32"): 5}
LAYERS |= {("adapted matrix", "bfloat16"): 5, ("adapted matrix", "float32"): 3}
TINY = {**WIDE, "hidden_size": 256, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 1}
RANK = 16
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="1GB")
"""


def make(folder: Path, fields: dict[str, Any], dtype: str) -> None:
    """Write a random model and an adapter; print the bytes of the model and of its largest tensor."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import rankwise

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**fields)).to(getattr(torch, dtype))
    model.save_pretrained(folder / "base", max_shard_size="200MB")
    rankwise.adapt(model, rankwise.adapters.Lora(rank=RANK, alpha=2.0 * RANK))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.01)
    rankwise.save(model, folder / "adapter", format="peft")
    sizes = {id(p): p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad}
    print(json.dumps({"bytes": sum(sizes.values()), "largest": max(sizes.values())}))


def compare(folder: Path) -> None:
    """Print how much tensors of the two merged models differ at most, of their sizes, and from the base."""
    from safetensors import safe_open

    files = {
        tool: {name: file for file in (folder / tool).glob("*.safetensors") for name in _names(file)}
        for tool in ("base", "rankwise", "peft")
    }
    assert files["base"].keys() == files["rankwise"].keys() == files["peft"].keys()
    most = {"difference": 0.0, "change": 0.0}
    for name in files["base"]:
        base, ours, theirs = (safe_open(files[tool][name], "pt").get_tensor(name).float() for tool in files)
        for key, other in (("difference", theirs), ("change", base)):
            most[key] = max(most[key], float((ours - other).norm() / other.norm()))
    print(json.dumps(most))


def _names(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def merge(tool: str, folder: Path) -> tuple[int, float]:
    """Merge in a process; return the most memory that it held, in bytes, and its seconds."""
    base, adapter, out = (str(folder / name) for name in ("base", "adapter", tool))
    cli = "from rankwise.cli import main; main()"
    words = {
        "rankwise": [
            cli,
            "export",
            adapter,
            "--base",
            base,
            "--to",
            "merged",
            "--out",
            out,
            "--set",
            "compare=0",
        ],
        "peft": [PEFT, base, adapter, out],
    }
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", *words[tool]], stdout=subprocess.DEVNULL) as started:
        _, code, usage = os.wait4(started.pid, 0)
        started.returncode = os.waitstatus_to_exitcode(code)
    if started.returncode:
        raise RuntimeError(f"{tool} failed with {started.returncode}.")
    return 1024 * usage.ru_maxrss, time.perf_counter() - start


def inside(*words: str) -> dict[str, Any]:
    """Run a part of this file in a process of its own, so that its memory is not counted to others."""
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure all cases, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="for temporary files, 5 GB; default: the system's place")
    parser.add_argument("--inside", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        what, folder, *more = options.inside
        compare(Path(folder)) if what == "compare" else make(Path(folder), json.loads(more[0]), more[1])
        return
    rows = []
    for (largest, dtype), layers in LAYERS.items():
        with tempfile.TemporaryDirectory(dir=options.work) as work:
            small, large = Path(work) / "small", Path(work) / "large"
            arguments = ("--json", str(options.json), "--inside")
            inside(*arguments, "make", str(small), json.dumps(TINY), dtype)
            fields = {**WIDE, **SHAPES[largest], "num_hidden_layers": layers}
            sizes = inside(*arguments, "make", str(large), json.dumps(fields), dtype)
            row = {"largest_is": largest, "dtype": dtype, **sizes}
            for tool in ("rankwise", "peft"):
                floor, _ = merge(tool, small)
                peak, seconds = merge(tool, large)
                row[tool] = {"floor": floor, "rise": peak - floor, "seconds": seconds}
                row[tool]["times_largest"] = (peak - floor) / sizes["largest"]
            rows.append(row | inside(*arguments, "compare", str(large)))
            print(json.dumps(rows[-1]), flush=True)
    about = {"command": command(), "environment": {**environment(), "peft": version("peft")}, "rank": RANK}
    options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
