"""Memory and repeatability of a streamed compression: a random Llama of 1.1B parameters, killed on the way.

Writes the checkpoint shard by shard (bfloat16, shape of TinyLlama), compresses it once without interruption and
once killed by SIGKILL in the forward sweep, in the backward sweep and among the shards, and compares all files.
Each run is a process of its own, whose peak resident memory the system reports. ``--layers`` limits what is
compressed: the sweeps go through all blocks anyway, but decomposing all layers takes long. Both runs go side by
side, so their seconds are those of a machine with half of its cores busy.

    python benchmarks/streaming.py --work FOLDER --json benchmarks/results/streaming.json
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from common import command, environment
from safetensors.torch import save_file

import rankwise
from rankwise.compressors import KroneckerFactoredSvd
from rankwise.core.memory import peak_memory_bytes
from rankwise.core.steps import MANIFEST

HIDDEN, INNER, HEADS, GROUPS, VOCABULARY, WINDOW = 2048, 5632, 32, 4, 32000, 512
FEW = HIDDEN * GROUPS // HEADS
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (FEW, HIDDEN),
    "self_attn.v_proj": (FEW, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def write_checkpoint(folder: Path, blocks: int) -> dict[str, int]:
    """Write a random model, a file for each block, and return bytes of its parts."""
    from transformers import LlamaConfig

    folder.mkdir(parents=True)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "num_hidden_layers": blocks}
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=False)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    block = SHAPES | {name: (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    parts = [{f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()} for i in range(blocks)]
    outside = {
        "model.embed_tokens": (VOCABULARY, HIDDEN),
        "lm_head": (VOCABULARY, HIDDEN),
        "model.norm": (HIDDEN,),
    }
    parts.append({f"{name}.weight": shape for name, shape in outside.items()})
    generator, places, sizes = torch.Generator().manual_seed(0), {}, []
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else (0.02 * torch.randn(shape, generator=generator)).bfloat16()
            for name, shape in part.items()
        }
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return {"block_bytes": sizes[0], "outside_bytes": sizes[-1], "total_bytes": sum(sizes)}


def work(options: argparse.Namespace) -> None:
    """Compress in this process, and print its figures."""
    before = peak_memory_bytes()
    ids = torch.randint(VOCABULARY, (options.tokens,), generator=torch.Generator().manual_seed(1))
    report = rankwise.compress_folder(
        options.work / "dense",
        options.out,
        KroneckerFactoredSvd(),
        keep=options.keep,
        data=list(ids.view(-1, 1, WINDOW)),
        where=lambda name, layer: "lm_head" not in name and re.search(options.layers, name) is not None,
    )
    print(
        json.dumps(
            {
                "peak_memory_bytes_at_start": before,
                "keep": report.totals["keep"],
                "seconds": report.totals["seconds"],
            }
        )
    )


def process(out: Path, kill_after: int | None = None) -> dict:
    """Run :func:`work` in a process, killed once so many steps are done; return its figures and its peak."""
    words = [sys.executable, *sys.argv, "--out", str(out)]
    start = time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as started:
        manifest = out.with_name(f"{out.name}.partial") / MANIFEST
        status = usage = None
        while not status:
            done, code, usage = os.wait4(started.pid, os.WNOHANG)
            status = done
            if kill_after is not None and manifest.exists() and steps(manifest) >= kill_after:
                started.send_signal(signal.SIGKILL)
                _, code, usage = os.wait4(started.pid, 0)
                status = -1
            time.sleep(0.05)
        started.returncode = os.waitstatus_to_exitcode(code)
        text = started.stdout.read()
    figures = json.loads(text) if text else {}
    if kill_after is None and started.returncode:
        raise RuntimeError(f"the run failed with {started.returncode}.")
    seconds = time.perf_counter() - start
    return {
        "wall_seconds": seconds,
        "peak_memory_bytes": usage.ru_maxrss * 1024,
        "killed": not figures,
        **figures,
    }


def known_steps(options: argparse.Namespace) -> int:
    """Count the steps of a whole run: hidden states, the loss, gradients, decompositions, shards."""
    chosen = sum(
        any(re.search(options.layers, f"model.layers.{i}.{name}") for name in SHAPES)
        for i in range(options.blocks)
    )
    return (options.blocks + 1) + 1 + options.blocks + chosen + (options.blocks + 1)


def steps(manifest: Path) -> int:
    """Count the finished steps of a run."""
    return len(json.loads(manifest.read_text())["steps"])


def digests(folder: Path) -> dict[str, str]:
    """Return a hash of each file."""
    found = {}
    for file in sorted(folder.iterdir()):
        with file.open("rb") as opened:
            found[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a new folder, removed afterwards")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=22)
    parser.add_argument("--layers", default=".", help="regular expression on layer names")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)  # in the processes that this one starts
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        print(json.dumps(write_checkpoint(options.work / "dense", options.blocks)))
        return
    if options.out:
        work(options)
        return
    options.work.mkdir(parents=True)
    try:
        making = [sys.executable, *sys.argv, "--make"]  # a process inherits the peak memory of its parent
        sizes = json.loads(subprocess.run(making, stdout=subprocess.PIPE, check=True).stdout)
        print(json.dumps(sizes), flush=True)
        forward, backward = options.blocks // 2, options.blocks + 2 + options.blocks // 2
        shards = known_steps(options) - options.blocks // 2
        with ThreadPoolExecutor() as pool:
            started = pool.submit(process, options.work / "whole")
            killed = [process(options.work / "killed", after) for after in (forward, backward, shards, None)]
            print(json.dumps(killed), flush=True)
            whole = started.result()
        print(json.dumps(whole), flush=True)
        same = digests(options.work / "whole") == digests(options.work / "killed")
        activations = {
            "logits of a window in float32": WINDOW * VOCABULARY * 4,
            "hidden state of a window": WINDOW * HIDDEN * 2,
        }
    finally:
        shutil.rmtree(options.work)
    arguments = {key: getattr(options, key) for key in ("blocks", "layers", "tokens", "keep")}
    result = {
        "command": command(),
        "environment": environment(),
        **arguments,
        **sizes,
        "activation_bytes": activations,
        "uninterrupted": whole,
        "killed": killed,
        "kills": sum(each["killed"] for each in killed),
        "bit_identical": same,
        "peak_memory_bytes": max(each["peak_memory_bytes"] for each in (whole, *killed)),
        "embeddings_and_3_blocks_bytes": sizes["outside_bytes"] + 3 * sizes["block_bytes"],
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
