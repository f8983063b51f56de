"""Optimisers as compositions of transforms, for :class:`rankwise.Optimizer`. Each call returns a transform."""

from .adafactor import adafactor
from .adam import adam
from .frugal import frugal
from .galore import galore
from .muon import muon
from .project import project
from .sgd import sgd
from .sign import sign

__all__ = ["adafactor", "adam", "frugal", "galore", "muon", "project", "sgd", "sign"]
