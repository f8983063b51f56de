"""Optimisers as compositions of transforms, for :class:`rankwise.Optimizer`. Each call returns a transform."""

from .adafactor import adafactor
from .adam import adam
from .adamp import adamp, sgdp
from .apollo import apollo, apollo_mini
from .aro import aro
from .auon import auon, hybrid_auon
from .dct_adamw import dct_adamw
from .fira import fira
from .frugal import frugal
from .galore import galore
from .ldadam import ldadam
from .muon import muon
from .project import project
from .sgd import sgd
from .sign import sign
from .soap import soap
from .trion import trion

__all__ = [
    "adafactor",
    "adam",
    "adamp",
    "apollo",
    "apollo_mini",
    "aro",
    "auon",
    "dct_adamw",
    "fira",
    "frugal",
    "galore",
    "hybrid_auon",
    "ldadam",
    "muon",
    "project",
    "sgd",
    "sgdp",
    "sign",
    "soap",
    "trion",
]
