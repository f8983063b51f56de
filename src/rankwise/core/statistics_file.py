"""Statistics on disk: written once, and read again only for the model they are about."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import statistics as kinds
from .errors import CalibrationError
from .fingerprint import fingerprint
from .statistics import Statistic, Statistics, Stats

FORMAT = 1


def save_statistics(statistics: Statistics, path: str | Path, model: nn.Module, about: str = "") -> None:
    """Write statistics and the content hash of their model to one safetensors file.

    Args:
        statistics: what to write.
        path: the file; it appears whole or not at all.
        model: the model that they are about, unchanged.
        about: what data they come from; a reader may ask for the same.
    """
    tensors, listing = pack(statistics.layers)
    header = listing | {
        "format": FORMAT,
        "model": fingerprint(model),
        "about": about,
        "seconds": statistics.seconds,
        "peak_memory_bytes": statistics.peak_memory_bytes,
    }
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={"rankwise": json.dumps(header)})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_statistics(path: str | Path, model: nn.Module, about: str | None = None) -> Statistics:
    """Read statistics that were saved for this very model.

    Raises:
        CalibrationError: if the file is damaged, or is about another model or other data.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["rankwise"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"{path} is not a statistics file or is damaged ({error}); collect again."
        ) from error
    if header.get("format") != FORMAT:
        raise CalibrationError(f"{path} has format {header.get('format')}, not {FORMAT}; collect again.")
    if header["model"] != fingerprint(model):
        raise CalibrationError(f"{path} is about another model or other weights; collect again.")
    if about is not None and header["about"] != about:
        raise CalibrationError(f"{path} is about other data ({header['about']!r}, not {about!r}); collect again.")
    return Statistics(unpack(tensors, header), header["seconds"], header["peak_memory_bytes"])


def pack(layers: Mapping[str, Stats]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the sums of some layers as tensors for a file, and JSON data that says which is which."""
    distinct = {id(s): s for stats in layers.values() for s in stats.values()}
    number = {key: str(i) for i, key in enumerate(distinct)}
    tensors = {number[key]: s.sum.cpu().contiguous() for key, s in distinct.items()}
    return tensors, {
        "counts": [s.count for s in distinct.values()],
        "layers": {
            name: {kind.__name__: number[id(s)] for kind, s in stats.items()} for name, stats in layers.items()
        },
    }


def gradient_counts(listing: Mapping[str, Any]) -> list[int]:
    """Return the rows of each statistic of gradients that :func:`pack` lists."""
    kinds = [each for layer in listing["layers"].values() for each in layer.items()]
    return [listing["counts"][int(key)] for kind, key in kinds if _kind(kind).side != "input"]


def unpack(tensors: Mapping[str, Tensor], listing: Mapping[str, Any]) -> dict[str, Stats]:
    """Return the statistics that :func:`pack` took apart; layers that shared one share it again."""
    sums: dict[tuple[str, str], Statistic] = {}

    def restore(kind_name: str, key: str) -> Statistic:
        if (kind_name, key) not in sums:
            statistic = _kind(kind_name).__new__(_kind(kind_name))
            statistic.sum, statistic.count = tensors[key], listing["counts"][int(key)]
            sums[kind_name, key] = statistic
        return sums[kind_name, key]

    return {
        name: {_kind(kind): restore(kind, key) for kind, key in stats.items()}
        for name, stats in listing["layers"].items()
    }


def _kind(name: str) -> type[Statistic]:
    known: Iterable[type[Statistic]] = (
        kinds.InputGram,
        kinds.OutputGradGram,
        kinds.InputMean,
        kinds.AnswerGram,
        kinds.AnswerMean,
        kinds.InputMagnitude,
        kinds.GradientWeightedInput,
        kinds.WeightGradient,
        kinds.BatchGradients,
    )
    found = {kind.__name__: kind for kind in known}
    if name not in found:
        raise CalibrationError(f"unknown statistic {name!r}; collect again with this version.")
    return found[name]
