"""Optimisers as compositions of transforms, for :class:`rankwise.Optimizer`. Each call returns a transform."""

from .adafactor import adafactor
from .adam import adam
from .frugal import frugal
from .galore import galore
from .grad_norm_lorp import grad_norm_lorp
from .hard_cap import hard_cap
from .lipschitz import lipschitz
from .muon import muon
from .project import project
from .q_galore import q_galore
from .quantised import adamw4bit, adamw8bit, quantised
from .row_cap import row_cap
from .sgd import sgd
from .sign import sign
from .soft_cap import soft_cap
from .spectral_hammer import spectral_decay, spectral_hammer
from .spectral_normalize import spectral_normalize
from .tscnc import tscnc
from .weight_norm import weight_norm

__all__ = [
    "adafactor",
    "adam",
    "adamw4bit",
    "adamw8bit",
    "frugal",
    "galore",
    "grad_norm_lorp",
    "hard_cap",
    "lipschitz",
    "muon",
    "project",
    "q_galore",
    "quantised",
    "row_cap",
    "sgd",
    "sign",
    "soft_cap",
    "spectral_decay",
    "spectral_hammer",
    "spectral_normalize",
    "tscnc",
    "weight_norm",
]
