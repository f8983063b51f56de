"""Matrices kept in factors. What ``__all__`` names is what a saved model may contain."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from .base import StructuredMatrix
from .block_affine import BlockAffine
from .branch import Branch
from .changed_factors import ChangedFactors
from .companded import Companded
from .dense import Dense
from .diagonal import Diagonal
from .expressions import Product, Scaled, Sum
from .frozen import Base, Frozen
from .hypercomplex import Hypercomplex
from .indexed_sparse import IndexedSparse
from .kept_column import KeptColumn
from .kernelled import Kernelled
from .kronecker import Kronecker
from .low_rank import LowRank, PivotedLowRank
from .permutation import Permutation
from .quantized import Quantized
from .recomputed import Recomputed
from .reflections import Reflections
from .row_normalised import RowNormalised
from .scheduled import Scheduled
from .seeded import Seeded
from .semi_sparse import SemiSparse
from .several import Several
from .sparse import Sparse
from .spectral import Spectral
from .tiled import Tiled

__all__ = [
    "Base",
    "BlockAffine",
    "Branch",
    "ChangedFactors",
    "Companded",
    "Dense",
    "Diagonal",
    "Frozen",
    "Hypercomplex",
    "IndexedSparse",
    "KeptColumn",
    "Kernelled",
    "Kronecker",
    "LowRank",
    "Permutation",
    "PivotedLowRank",
    "Product",
    "Quantized",
    "Recomputed",
    "Reflections",
    "RowNormalised",
    "Scaled",
    "Scheduled",
    "Seeded",
    "SemiSparse",
    "Several",
    "Sparse",
    "Spectral",
    "StructuredMatrix",
    "Sum",
    "Tiled",
    "from_spec",
]

MAX_NESTING = 16


def kinds() -> dict[str, type[StructuredMatrix]]:
    """Return every kind of structured matrix that is exported, by name."""
    exported = {name: globals()[name] for name in __all__}
    return {
        name: kind
        for name, kind in exported.items()
        if inspect.isclass(kind) and issubclass(kind, StructuredMatrix) and not inspect.isabstract(kind)
    }


def from_spec(
    spec: Any, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> StructuredMatrix:
    """Rebuild the matrix of a spec with uninitialised tensors, to be filled by ``load_state_dict``.

    Args:
        spec: what ``StructuredMatrix.spec`` returned; data from a file is fine, it is checked.
        dtype: of the floating-point tensors; torch's default if None.
        device: where the tensors live; "meta" allocates nothing.

    Raises:
        ValueError: if the kind is unknown, or a size is missing or impossible.

    >>> from_spec({"kind": "LowRank", "shape": [4, 3], "rank": 2}).shape
    (4, 3)
    """
    if not isinstance(spec, Mapping):
        raise ValueError(f"a spec must be a mapping with a 'kind', got {spec!r}.")
    known = kinds()
    name = spec.get("kind")
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"unknown kind of matrix {name!r} in a spec; known are {', '.join(known)}.")
    _check_nesting(spec)
    return known[name].empty(spec, dtype=dtype, device=device)


def _check_nesting(value: Any, left: int = 2 * MAX_NESTING) -> None:
    """Raise if lists and mappings stand inside each other too deeply; each expression takes two levels."""
    if left < 0:
        raise ValueError(f"a spec must not be nested deeper than {MAX_NESTING} expressions.")
    if isinstance(value, (Mapping, list, tuple)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            _check_nesting(inner, left - 1)
