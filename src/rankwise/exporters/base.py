"""What all export formats share: what they are given, and what they promise."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models import load, save
from ..models.load import find


@dataclass(frozen=True)
class Source:
    """A model to export, as a folder or in memory; each is made from the other when a format asks for it.

    Args:
        given: a module, or what :func:`rankwise.load` takes; or folders of adapters with their weights.
        tokenizer: that belongs to a module.
        scratch: a folder for temporary files.
    """

    given: nn.Module | str | Path | Mapping[Any, float]
    tokenizer: Any
    scratch: Path

    def folder(self) -> Path:
        """Return a folder with the model; one in memory is saved first.

        Raises:
            ValueError: if there is no such folder.
        """
        if isinstance(self.given, nn.Module):
            kept = self.scratch / "model"
            return kept if kept.is_dir() else save(self.given, kept, self.tokenizer)
        folder = find(self._one())
        if not folder.is_dir():
            raise ValueError(
                f"{self.given} is a file; give the folder of a model that rankwise or transformers wrote."
            )
        return folder

    def model(self, dtype: torch.dtype) -> nn.Module:
        """Return the model in memory; a folder is loaded first, in a type.

        Raises:
            ValueError: if it cannot be loaded.
        """
        return self.given if isinstance(self.given, nn.Module) else load(self._one(), dtype=dtype)[0]

    def _one(self) -> str | Path:
        if not isinstance(self.given, (str, Path)):
            raise ValueError("several adapters with weights need a format that takes adapters, such as Merged.")
        return self.given


class Exporter(abc.ABC):
    """Writes a model in a format of other tools, and reads back what it wrote."""

    @abc.abstractmethod
    def write(self, source: Source, out: Path) -> None:
        """Fill the empty folder ``out``.

        Raises:
            ValueError: if the model does not fit the format, or what was written does not read back the same.
            OSError: if the disk does not take it.
        """
