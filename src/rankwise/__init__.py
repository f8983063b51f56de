"""Inspect, compress, adapt, train and merge neural networks through the structure of their matrices."""

from . import allocators, compressors, matrices, measures, preconditioners, starts
from .api import calibrate, compress, fold, heal, initialise, inspect, trainable_low_rank
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
    "fold",
    "heal",
    "initialise",
    "inspect",
    "load",
    "matrices",
    "measures",
    "preconditioners",
    "save",
    "starts",
    "trainable_low_rank",
]

register_when_ready()
