"""Inspect, compress, adapt, train and merge neural networks through the structure of their matrices."""

from . import allocators, compressors, exporters, matrices, measures
from .api import calibrate, compress, export, fold, inspect
from .core.errors import CalibrationError
from .core.report import Report
from .core.surgery import StructuredLinear
from .models import evaluate, load, save
from .models.quantizer import register_when_ready

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
    "export",
    "exporters",
    "fold",
    "inspect",
    "load",
    "matrices",
    "measures",
    "save",
]

register_when_ready()
