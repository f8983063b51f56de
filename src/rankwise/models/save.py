"""Write a model, or the adapters of one."""

import os
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..core.extended import refuse_extended
from ..core.files import new_folder
from . import adapter_files, peft_files
from .classifier import write_labels
from .model_files import save_model

WRITERS = {"rankwise": adapter_files.write_adapter, "peft": peft_files.write_peft}


def save(
    model: nn.Module,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    format: Literal["model", "rankwise", "peft"] = "model",
) -> Path:
    """Write a model, or the adapters of one, and read the files back before the folder gets its name.

    Args:
        model: of transformers, compressed or not; for adapters any module. It is not changed.
        folder: a new or empty one. An interrupted call leaves nothing under this name.
        tokenizer: of transformers, saved beside the rest.
        format: "model" writes all, so that plain transformers loads it after ``import rankwise``. The others
            write adapters and parameters that train whole, but not the matrices under the adapters: "rankwise"
            every kind, bit by bit, also modules behind layers; "peft" what Hugging Face PEFT can compute, in its
            files. Of a classifier of transformers the names of the classes are written beside them.

    Returns:
        the folder.

    Raises:
        TypeError: if a whole model is not one of transformers.
        ValueError: if the model does not fit the format, the folder holds something already, or what was written
            does not read back the same.
    """
    if format != "rankwise":
        refuse_extended(model, "has no place in this format; give format='rankwise'")
    folder = Path(os.path.abspath(folder))
    if format == "model":
        save_model(model, folder, tokenizer)
        return folder
    if format not in WRITERS:
        raise ValueError(f"format must be 'model', {', '.join(map(repr, WRITERS))}, got {format!r}.")
    with new_folder(folder) as temporary:
        WRITERS[format](model, temporary)
        write_labels(model, temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    return folder
