"""Folders of ordinary weights, written some numbers at a time."""

import json
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..core.finite import is_finite
from ..core.progress import track
from ..core.tensor_file import write_tensors
from ..models.model_folder import files_beside


class Weights(Protocol):
    """Tensors by name, each made when it is asked for."""

    def parts(self, name: str) -> Iterable[Tensor]:
        """Make one, whole or in consecutive parts."""
        ...

    def empty(self, name: str) -> Tensor:
        """Return one without values."""
        ...


def write_shards(weights: Weights, names: Iterable[str], out: Path, shard: int, stem: str = "model") -> None:
    """Write files of at most ``shard`` megabytes, or one tensor, and an index if there are several.

    Raises:
        ValueError: if a tensor holds NaN or infinity, or does not read back.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    def parts(name: str) -> Iterable[Tensor]:
        return map(partial(_checked, name), weights.parts(name))  # which holds one part at a time

    empty = {name: weights.empty(name) for name in names}
    plan = split_torch_state_dict_into_shards(
        empty, max_shard_size=shard * 10**6, filename_pattern=f"{stem}{{suffix}}.safetensors"
    )
    for file, inside in track(plan.filename_to_tensors.items(), "shards"):
        write_tensors(out / file, {name: empty[name] for name in inside}, parts)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (out / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _checked(name: str, part: Tensor) -> Tensor:
    if not is_finite(part):
        raise ValueError(
            f"{name} holds NaN or infinity as {part.dtype}; mend the source, or give a base of a wider type if "
            "numbers became too large for this one."
        )
    return part


def copy_beside(folder: Path, config: Any, out: Path) -> None:
    """Copy what stands beside the weights of a model, and write its config."""
    for file in files_beside(folder):
        shutil.copy(file, out)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_shard(shard: int) -> None:
    """Raise unless a size of files is possible."""
    if shard < 1:
        raise ValueError(f"shard must be >= 1 megabyte, got {shard}.")
