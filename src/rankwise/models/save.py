"""Write a model, or the adapters of one."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..core.extended import refuse_extended
from ..core.files import new_folder
from ..core.several import used
from ..core.wrapped import unwrapped
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
    name: str | None = None,
) -> Path:
    """Write a model, or the adapters of one, and read the files back before the folder gets its name.

    Args:
        model: of transformers, compressed or not; for adapters any module. It is not changed. What
            ``torch.compile`` or ``DistributedDataParallel`` wrap around it is left out.
        folder: a new or empty one. An interrupted call leaves nothing under this name.
        tokenizer: of transformers, saved beside the rest.
        format: "model" writes all, so that plain transformers loads it after ``import rankwise``. The others
            write adapters and parameters that train whole, but not the matrices under the adapters: "rankwise"
            every kind, bit by bit, also modules behind layers; "peft" what Hugging Face PEFT can compute, in its
            files, which hold what is computed but not all of how it trains on: PEFT takes the denominators of
            rows with trained lengths as constants, also those of ``GradNormLorp(constant=False)``, and where
            several adapters add up to one it drops the same inputs for all, and none if they differ in dropout.
            Of a classifier of transformers the names of the classes are written beside them. Both also hold
            hashes of the matrices under the adapters, so that none is put onto another model.
        name: of adapters with names the one to be written; None takes what is in use, also a weighted sum, which
            is then one adapter.

    Returns:
        the folder.

    Raises:
        TypeError: if a whole model is not one of transformers.
        ValueError: if the model does not fit the format, the folder holds something already, or what was written
            does not read back the same.
    """
    model = unwrapped(model)
    if format != "rankwise":
        refuse_extended(model, "has no place in this format; give format='rankwise'")
    folder = Path(os.path.abspath(folder))
    if name is not None and format not in WRITERS:
        raise ValueError(f"format {format!r} writes no adapter; give {' or '.join(map(repr, WRITERS))}.")
    if format == "model":
        save_model(model, folder, tokenizer)
        return folder
    if format not in WRITERS:
        raise ValueError(f"format must be 'model', {', '.join(map(repr, WRITERS))}, got {format!r}.")
    with new_folder(folder) as temporary, nullcontext() if name is None else used(model, name):
        WRITERS[format](model, temporary)
        write_labels(model, temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    return folder
