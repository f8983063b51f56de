"""Optimisers as compositions of transforms, for :class:`rankwise.Optimizer`. Each call returns a transform."""

from .adafactor import adafactor
from .adam import adam
from .apollo import apollo, apollo_mini
from .fira import fira
from .frugal import frugal
from .galore import galore
from .ldadam import ldadam
from .muon import muon
from .project import project
from .sgd import sgd
from .sign import sign
from .soap import soap

__all__ = [
    "adafactor",
    "adam",
    "apollo",
    "apollo_mini",
    "fira",
    "frugal",
    "galore",
    "ldadam",
    "muon",
    "project",
    "sgd",
    "sign",
    "soap",
]
