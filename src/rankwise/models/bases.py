"""Which matrices adapters were made for: their shapes, and hashes of their values."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.files import write_text
from ..core.fingerprint import values_digest
from ..core.surgery import base_of
from ..matrices import StructuredMatrix

NAME = "rankwise_bases.json"  # beside files of another format, which has no place for it


def record_of(matrix: StructuredMatrix) -> dict[str, Any]:
    """Say which matrix an adapter was made for.

    Args:
        matrix: with an adapter, or the one that is to get it.
    """
    base = base_of(matrix)
    under = matrix if base is None else base.matrix
    return {"shape": list(under.shape), "digest": _digest(under)}


def is_record(found: Any) -> bool:
    """Whether something is what :func:`record_of` returns."""
    match found:
        case {"shape": [int(), int()], "digest": str()}:
            return True
    return False


def write_bases(folder: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the records of layers beside the file of their adapters."""
    write_text(folder / NAME, json.dumps(records, indent=1) + "\n")


def is_other(name: str, base: StructuredMatrix, record: Mapping[str, Any], title: str) -> bool:
    """Whether a matrix has other values than the recorded one.

    Args:
        name: of the layer.
        base: its matrix.
        record: of the matrix that its adapter was made for.
        title: of the folder of the adapter.

    Raises:
        ValueError: if it has another shape.
    """
    if list(base.shape) != record["shape"]:
        raise ValueError(
            f"layer {name} is {tuple(base.shape)} in the model, but {tuple(record['shape'])} in {title}; it "
            "belongs to another model."
        )
    return _digest(base) != record["digest"]


def _digest(matrix: StructuredMatrix) -> str:
    """Return a hash of what a matrix stores, the same in all types that hold its values exactly."""
    return values_digest(matrix.state_dict())
