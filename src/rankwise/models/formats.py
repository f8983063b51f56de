"""Write a model or its adapters, and put written adapters onto a model."""

import os
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..core.files import new_folder
from ..core.report import Report
from . import adapter_files, peft_files
from .save import save_model

WRITERS = {"rankwise": adapter_files.write_adapter, "peft": peft_files.write_peft}
READERS = {adapter_files.NAME: adapter_files.OwnFolder, peft_files.NAME: peft_files.PeftFolder}


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
        format: "model" writes all, so that plain transformers loads it after ``import rankwise``. The others write
            adapters and parameters that train whole, but not the matrices under the adapters: "rankwise" every
            kind, bit by bit; "peft" those that Hugging Face PEFT computes, in its files.

    Returns:
        the folder.

    Raises:
        TypeError: if a whole model is not one of transformers.
        ValueError: if the model does not fit the format, the folder holds something already, or what was written
            does not read back the same.
    """
    folder = Path(os.path.abspath(folder))
    if format == "model":
        save_model(model, folder, tokenizer)
        return folder
    if format not in WRITERS:
        raise ValueError(f"format must be 'model', {', '.join(map(repr, WRITERS))}, got {format!r}.")
    with new_folder(folder) as temporary:
        WRITERS[format](model, temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    return folder


def load_adapter(model: nn.Module, folder: str | Path, *, strict: bool = True) -> Report:
    """Put the adapters of a folder onto a model, in place; the same parameters train as when they were written.

    Args:
        model: that has none yet, dense or compressed as the one was that was adapted.
        folder: from :func:`save` with format "rankwise" or "peft", or from PEFT itself.
        strict: False goes on where tensors are missing, or not read by anything, or the matrix under an adapter
            has other values than it had; the totals of the report name these.

    Returns:
        a report with a row for each adapted layer.

    Raises:
        ValueError: if it is no such folder, a file is damaged, or something does not fit. The model is as before.
    """
    folder = Path(folder)
    found = next((reader for name, reader in READERS.items() if (folder / name).is_file()), None)
    if found is None:
        raise ValueError(f"{folder} has neither {' nor '.join(READERS)}; give a folder with an adapter.")
    adaptation = found(folder).adaptation(model)
    if strict:
        adaptation.check(str(folder))
    return adaptation.apply(model, folder.name)
