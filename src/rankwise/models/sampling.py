"""Calibration data that needs no data set: sequences sampled from the model itself."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..core.files import cache_folder
from ..core.fingerprint import fingerprint
from ..core.progress import track
from ..linalg import draw_categorical
from .causal import Continued, check_causal, evaluating

VERSION = 2  # of the algorithm below: a change that alters samples makes old files useless


def sample(
    model: nn.Module,
    *,
    tokens: int = 24576,
    window: int = 512,
    seed: int = 0,
    temperature: float = 1.0,
    batch: int = 64,
    autocast: bool = False,
    cache: bool = True,
) -> Tensor:
    """Sample sequences from a causal language model, to calibrate it without any data.

    Each sequence starts with a token drawn uniformly from the vocabulary; each further one is drawn
    from the whole softmax distribution, and an end-of-text token does not stop it. The token at t + 1 is
    thus a label drawn from the model at t, as the true Fisher information wants it. The same model, arguments and
    machine give the same tokens.

    Args:
        model: of transformers.
        tokens: how many at least; the last sequence is whole.
        window: length of the sequences.
        seed: of all draws.
        temperature: divides the logits; 1 is the model's own distribution.
        batch: how many sequences run together; their keys and values must fit in memory.
        autocast: compute in bfloat16, faster on CPUs that have instructions for it. A
            model in bfloat16 already is as fast without.
        cache: keep the result in the folder ``samples`` of the user's cache (``RANKWISE_CACHE``, else
            ``~/.cache/rankwise``), and take it from there the next time.

    Returns:
        (sequences, window) token ids on the CPU.

    Raises:
        ValueError: if an argument is out of range, the model is not a causal language model, or its
            logits are not finite.
    """
    least = {"tokens": (tokens, 1), "window": (window, 2), "batch": (batch, 1)}
    for name, (value, low) in least.items():
        if value < low:
            raise ValueError(f"{name} must be >= {low}, got {value}.")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}; 1 is the model's own distribution.")
    causal = check_causal(model, window, "pass calibration data, it cannot be sampled from")
    arguments = {
        "tokens": tokens,
        "window": window,
        "seed": seed,
        "temperature": temperature,
        "batch": batch,
        "autocast": autocast,
    }
    path = _path(causal, arguments) if cache else None
    count = -(-tokens // window)
    if path is not None:
        known = _read(path, (count, window))
        if known is not None:
            return known
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(causal.get_input_embeddings().num_embeddings, (count,), generator=generator)
    draws = torch.rand(count, window - 1, generator=generator)
    with evaluating(causal), torch.autocast(causal.device.type, torch.bfloat16, enabled=autocast):
        parts = [
            _sequences(
                causal,
                start,
                draw,
                temperature,
                f"sampling sequences {i * batch + 1} to {i * batch + len(start)}",
            )
            for i, (start, draw) in enumerate(zip(starts.split(batch), draws.split(batch), strict=True))
        ]
    ids = torch.cat(parts)
    if path is not None:
        _write(path, ids)
    return ids


def _sequences(model: Any, starts: Tensor, draws: Tensor, temperature: float, description: str) -> Tensor:
    """Turn (b,) first tokens and (b, t) uniform numbers into (b, t + 1) tokens."""
    from .key_value import Float32Attention, reserved_cache

    device, steps = model.device, draws.shape[1]
    short = model.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(device.type)
    in_float32 = short and device.type == "cpu" and model.config._attn_implementation == "sdpa"
    continued = Continued(model, reserved_cache(model, steps, torch.float32 if in_float32 else None))
    draws = draws.to(device)
    ids = [starts[:, None].to(device)]
    with Float32Attention() if in_float32 else contextlib.nullcontext():
        for t in track(range(steps), description):
            logits = continued.next(ids[-1])
            ids.append(draw_categorical(logits / temperature, draws[:, t : t + 1]))
    return torch.cat(ids, dim=1).cpu()


def _path(model: Any, arguments: dict[str, Any]) -> Path:
    folder = cache_folder() / "samples"
    config = {
        k: v for k, v in model.config.to_dict().items() if k not in ("transformers_version", "_name_or_path")
    }
    what = [VERSION, fingerprint(model), config, arguments, model.device.type]
    text = json.dumps(what, sort_keys=True, default=str)
    return folder / f"{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}.safetensors"


def _read(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """Return the samples of an earlier run, or None if there is no file or it was damaged."""
    if not path.is_file():
        return None
    try:
        ids = load_file(path).get("ids")
    except SafetensorError:
        return None
    return ids if ids is not None and tuple(ids.shape) == shape else None


def _write(path: Path, ids: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({"ids": ids}, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
