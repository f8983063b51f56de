"""Put written adapters onto a model."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from ..core.adapted import adapted
from ..core.report import Report
from ..core.several import check_name
from ..core.wrapped import unwrapped
from . import adapter_files, peft_files
from .adapter_folder import AdapterFolder
from .classifier import check_labels, put_labels

READERS: dict[str, Callable[[Path], AdapterFolder]] = {
    adapter_files.NAME: adapter_files.OwnFolder,
    peft_files.NAME: peft_files.PeftFolder,
}


def load_adapter(model: nn.Module, folder: str | Path, *, name: str | None = None, strict: bool = True) -> Report:
    """Put the adapters of a folder onto a model, in place; the same parameters train as when they were written.

    A classifier that was made of another model is made so again: ``load_classifier(base, read_labels(folder))``
    of :mod:`rankwise.models`. Its classes get the names of the folder.

    Args:
        model: dense or compressed as the one was that was adapted. It has no adapters yet, or such with names.
        folder: from :func:`save` with format "rankwise" or "peft", or from PEFT itself.
        name: under which it stands beside others around the same matrices, which may be on other layers and of
            other kinds. It is then in use, and the others are not: see :func:`rankwise.use`.
        strict: False goes on where tensors are missing, or not read by anything, or the matrix under an adapter
            has other values than it had; the totals of the report name these. Some layer must get an adapter.

    Returns:
        a report with a row for each adapted layer.

    Raises:
        ValueError: if it is no such folder, a file is damaged, something does not fit, the name is taken, or an
            adapter with a name would replace parameters of the model. The model is as before.
    """
    model = unwrapped(model)
    check_name(model, name)
    if name is None and (busy := next(iter(adapted(model)), None)):
        raise ValueError(f"layer {busy} has an adapter already; fold it first, or load the model anew.")
    adapter = open_adapter(folder)
    if adapter.labels and strict:
        check_labels(model, adapter.labels, str(folder))
    adaptation = adapter.adaptation(model)
    adaptation.check(str(folder), strict)
    if name is not None and (adaptation.whole or adaptation.modules):
        raise ValueError(
            f"{folder} holds modules behind layers, or replaces parameters of the model, such as norms, biases "
            "or the head, which adapters with names share; load it alone, without a name."
        )
    put_labels(model, adapter.labels)
    return adaptation.apply(model, Path(folder).name, name)


def open_adapter(folder: str | Path) -> AdapterFolder:
    """Read a folder with an adapter, of either format.

    Raises:
        ValueError: if it is none, or a file is damaged.
    """
    found = next((reader for name, reader in READERS.items() if (Path(folder) / name).is_file()), None)
    if found is None:
        raise ValueError(f"{folder} has neither {' nor '.join(READERS)}; give a folder with an adapter.")
    return found(Path(folder))
