"""What the formats share that are made of an adapter and the model under it."""

import abc
import re
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..models import save
from ..models.adapted_weights import AdaptedWeights, open_weights
from ..models.load import find
from ..models.load_adapter import open_adapter
from .base import Exporter, Source

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True)
class AdaptedExporter(Exporter):
    """Makes something of an adapter, given as its folder or in a model, and of the model that was adapted.

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
        return open_weights(base, open_adapter(adapter_of(source)), bytes_of(memory))

    @abc.abstractmethod
    def write(self, source: Source, out: Path) -> None:
        """Fill the empty folder ``out``."""


def adapter_of(source: Source) -> Path:
    """Return the folder of an adapter; that of a model in memory is saved first."""
    given = source.given
    if isinstance(given, nn.Module):
        given = save(given, source.scratch / "adapter", format="rankwise")
    return Path(given)


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
