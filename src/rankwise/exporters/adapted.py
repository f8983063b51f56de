"""What the formats share that are made of an adapter and the model under it."""

import abc
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..models import save
from ..models.adapted_weights import AdaptedWeights, open_weights
from ..models.adapter_folder import AdapterFolder
from ..models.load import find
from ..models.load_adapter import open_adapter
from ..models.summed_folder import SummedFolder
from .base import Exporter, Source

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True)
class AdaptedExporter(Exporter):
    """Makes something of an adapter, given as its folder or in a model, and of the model that was adapted.

    Several folders with weights count as one adapter, the weighted sum of what they change.

    Args:
        base: the model that was adapted, compressed or not: a folder, a hub id, or an embedded model.
    """

    base: str

    def weights(self, source: Source, memory: str | None = None) -> AdaptedWeights:
        """Open the adapter and the model under it.

        Raises:
            ValueError: if one is no such folder, or they do not belong together.
        """
        base = find(self.base)
        if base.is_file():
            raise ValueError(f"{self.base} is one file; give the folder of a model.")
        return open_weights(base, self.adapter(source), bytes_of(memory))

    def adapter(self, source: Source) -> AdapterFolder:
        """Read the adapter, or several with their weights as one.

        Raises:
            ValueError: if a folder is none of an adapter, or there is no sum.
        """
        given = source.given
        if isinstance(given, nn.Module):
            kept = source.scratch / "adapter"
            given = kept if kept.is_dir() else save(given, kept, format="rankwise")
        if isinstance(given, Mapping):
            return SummedFolder([(open_adapter(folder), weight) for folder, weight in given.items()])
        return open_adapter(given)

    @abc.abstractmethod
    def write(self, source: Source, out: Path) -> None:
        """Fill the empty folder ``out``."""


def bytes_of(text: str | None) -> int | None:
    """Read a size such as 2GiB, 500MB or a number of bytes.

    Raises:
        ValueError: if it is none.

    >>> bytes_of("2KiB"), bytes_of("1.5MB"), bytes_of(None)
    (2048, 1500000, None)
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", str(text), re.IGNORECASE)
    size = round(float(found[1]) * UNITS[(found[2] or "").upper()]) if found else 0
    if size < 1:
        raise ValueError(f"memory must be a size such as 2GiB or 500MB, got {text!r}.")
    return size
