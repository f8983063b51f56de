"""How fast models are: measured side by side, so that they suffer the same disturbances."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.progress import track
from .causal import Continued, check_causal, evaluating


def speed(
    models: Mapping[str, nn.Module], ids: Tensor, *, prefill: int = 512, decode: int = 32, repeats: int = 5
) -> dict[str, dict[str, float]]:
    """Measure how many tokens a second causal language models read and write.

    Models take turns and the median over the turns is reported, after one turn of warming up.

    Args:
        models: of transformers, by name.
        ids: (t,) token ids to read; the first ``prefill`` are used.
        prefill: tokens read at once; only the last one's logits are computed, as in generation.
        decode: tokens then written one by one, with a key-value cache.
        repeats: turns.

    Returns:
        for each name ``prefill_tokens_per_s`` and ``decode_tokens_per_s``.

    Raises:
        ValueError: if an argument is out of range, or a model is not a causal language model.
    """
    for name, value in {"prefill": prefill, "decode": decode, "repeats": repeats}.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}.")
    if ids.dim() != 1 or len(ids) < prefill:
        raise ValueError(f"ids must be (t,) with t >= prefill = {prefill}, got {tuple(ids.shape)}.")
    causal = {name: check_causal(m, prefill + decode, "speed needs one") for name, m in models.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with evaluating(*models.values()):
        for _ in track(range(repeats + 1), "measuring speed"):
            for name, model in causal.items():
                times[name].append(_turn(model, ids[None, :prefill].to(model.device), decode))
    return {
        name: {
            "prefill_tokens_per_s": prefill / statistics.median(read for read, _ in turns[1:]),
            "decode_tokens_per_s": decode / statistics.median(write for _, write in turns[1:]),
        }
        for name, turns in times.items()
    }


def _turn(model: Any, ids: Tensor, decode: int) -> tuple[float, float]:
    """Return the seconds to read the ids and to write ``decode`` tokens."""
    continued = Continued(model)
    start = _now(model.device)
    step = continued.next(ids).argmax(-1, keepdim=True)
    middle = _now(model.device)
    for _ in range(decode):
        step = continued.next(step).argmax(-1, keepdim=True)
    return middle - start, _now(model.device) - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
