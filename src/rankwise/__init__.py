"""Inspect, compress, adapt, train and merge neural networks through the structure of their matrices."""

from typing import TYPE_CHECKING, Any

from . import allocators, compressors, matrices
from .api import calibrate, compress, inspect
from .core.errors import CalibrationError
from .core.report import Report
from .core.surgery import StructuredLinear, fold

if TYPE_CHECKING:
    from .models import evaluate, load, save

__version__ = "0.1.0"
__all__ = [
    "CalibrationError",
    "Report",
    "StructuredLinear",
    "allocators",
    "calibrate",
    "compress",
    "compressors",
    "evaluate",
    "fold",
    "inspect",
    "load",
    "matrices",
    "save",
]


def __getattr__(name: str) -> Any:
    """Import what needs transformers only when it is used."""
    if name in ("evaluate", "load", "save"):
        from . import models

        return getattr(models, name)
    raise AttributeError(f"module 'rankwise' has no attribute {name!r}")
