"""Any adapter as a LoRA in PEFT's files, exact where its change has a low rank."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core.progress import track
from ..models.adapted_weights import AdaptedWeights
from ..models.bases import record_of, write_bases
from ..models.classifier import write_labels
from ..models.load import is_hub_id
from ..models.peft_files import biases_of, modules_of, tied_to, write_pieces
from ..models.peft_kinds import LoraKind
from .adapted import AdaptedExporter
from .base import Source

ERRORS = "rankwise_errors.json"


@dataclass(frozen=True, kw_only=True)
class Lora(AdaptedExporter):
    """A folder of PEFT: every change of low rank as a LoRA of that rank, and others cut to a rank.

    What is cut off is in ``rankwise_errors.json``: the size of each layer's error relative to that of its change,
    in the Frobenius norm.

    Args:
        base: the model that was adapted, compressed or not: a folder, a hub id, or an embedded model.
        rank: the largest; None takes none away, and refuses changes of no low rank.
    """

    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be >= 1 or None, got {self.rank}.")

    def write(self, source: Source, out: Path) -> None:
        """Factorise layer by layer.

        Raises:
            ValueError: if adapter and model do not belong together, or a change needs a rank and none is given.
        """
        weights, kind = self.weights(source), LoraKind()
        pieces, errors, records = {}, {}, {}
        for name, layer in track(weights.names.items(), "layers"):
            matrix, view = weights.matrix(name), weights.site(name).view
            if not kind.fits(view):
                raise ValueError(
                    f"layer {layer} is a convolution with dilation, which PEFT's LoRA does not have; export to "
                    "merged instead."
                )
            pieces[layer] = piece = kind.piece(matrix, view, self.rank)
            if piece is None:
                raise ValueError(f"layer {layer}: its change is of no low rank: give a rank to cut it to.")
            errors[layer], records[layer] = piece.error, record_of(matrix)
        fields = kind.describe(pieces)
        if fields is None:
            raise ValueError("some layers have rows of trained lengths and others have not, or dropout differs.")
        views = {layer: weights.site(name).view for name, layer in weights.names.items()}
        _fill(weights, views)
        base = self.base if is_hub_id(self.base) else str(weights.folder)
        write_pieces(weights.model, views, kind, pieces, fields, out, base)
        write_bases(out, records)
        write_labels(weights.model, out)
        weights.finish()
        (out / ERRORS).write_text(json.dumps(errors, indent=1) + "\n", encoding="utf-8")


def _fill(weights: AdaptedWeights, layers: Iterable[str]) -> None:
    """Give an empty model the values that are written beside adapters: what trained whole, and its neighbours."""
    model: Any = weights.model.requires_grad_(False)
    for name in weights.adapter.whole:
        _put(model, name, weights.parameter(name), trains=True)
    modules = modules_of(model, layers)
    beside = [
        f"{path}.{name}"
        for path in (*modules, *tied_to(model, modules))
        for name, _ in model.get_submodule(path).named_parameters()
    ]
    for name in (*beside, *(f"{layer}.bias" for layer in biases_of(model, layers))):
        if model.get_parameter(name).is_meta:
            _put(model, name, weights.parameter(name), trains=False)


def _put(model: nn.Module, name: str, value: Tensor, *, trains: bool) -> None:
    """Give a parameter a value, under all its names."""
    old, new = model.get_parameter(name), nn.Parameter(value, trains)
    for other, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter is old:
            path, _, last = other.rpartition(".")
            setattr(model.get_submodule(path), last, new)
