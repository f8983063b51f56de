"""Optimisers as compositions of transforms, for :class:`rankwise.Optimizer`. Each call returns a transform."""

from .adafactor import adafactor
from .adam import adam
from .frugal import frugal
from .galore import galore
from .muon import muon
from .project import project
from .q_galore import q_galore
from .quantised import adamw4bit, adamw8bit, quantised
from .sgd import sgd
from .sign import sign

__all__ = [
    "adafactor",
    "adam",
    "adamw4bit",
    "adamw8bit",
    "frugal",
    "galore",
    "muon",
    "project",
    "q_galore",
    "quantised",
    "sgd",
    "sign",
]
