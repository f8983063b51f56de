"""Optimisers as compositions of transforms, for :class:`rankwise.Optimizer`. Each call returns a transform."""

from ..core.stored import batched, transposed
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
from .grad_norm_lorp import grad_norm_lorp
from .hard_cap import hard_cap
from .ldadam import ldadam
from .lipschitz import lipschitz
from .muon import muon
from .oblique import oblique
from .orthogonal_penalty import orthogonal_penalty
from .project import project
from .q_galore import q_galore
from .quantised import adamw4bit, adamw8bit, quantised
from .row_cap import row_cap
from .sgd import sgd
from .sign import sign
from .soap import soap
from .soft_cap import soft_cap
from .spectral_hammer import spectral_decay, spectral_hammer
from .spectral_normalize import spectral_normalize
from .stiefel import stiefel
from .trion import trion
from .tscnc import tscnc
from .weight_norm import weight_norm

__all__ = [
    "adafactor",
    "adam",
    "adamp",
    "adamw4bit",
    "adamw8bit",
    "apollo",
    "apollo_mini",
    "aro",
    "auon",
    "batched",
    "dct_adamw",
    "fira",
    "frugal",
    "galore",
    "grad_norm_lorp",
    "hard_cap",
    "hybrid_auon",
    "ldadam",
    "lipschitz",
    "muon",
    "oblique",
    "orthogonal_penalty",
    "project",
    "q_galore",
    "quantised",
    "row_cap",
    "sgd",
    "sgdp",
    "sign",
    "soap",
    "soft_cap",
    "spectral_decay",
    "spectral_hammer",
    "spectral_normalize",
    "stiefel",
    "transposed",
    "trion",
    "tscnc",
    "weight_norm",
]
