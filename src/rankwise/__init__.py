"""Inspect, compress, adapt, train and merge neural networks through the structure of their matrices."""

from . import (
    adapters,
    allocators,
    compressors,
    estimators,
    exporters,
    initialisers,
    layers,
    matrices,
    measures,
    optimizers,
    preconditioners,
    projectors,
    rank_rules,
    schedules,
    starts,
)
from .absorbing import absorb
from .adapting import adapt
from .api import calibrate, compress, export, fold, inspect
from .certificate import lipschitz_bound
from .checking import check_adapters
from .core.errors import CalibrationError
from .core.integer_weights import IntegerWeights, train_as_floats, train_as_integers
from .core.optimizer import Optimizer
from .core.replicated import Replicated
from .core.report import Report
from .core.stepping import Layerwise
from .core.surgery import StructuredLinear
from .core.writing import StochasticRounding
from .curvature import fisher_spectrum, jacobian_spectrum, tangent_kernel
from .estimating import estimate
from .finetuning import finetune
from .following import finish, follow
from .gradual import compress_gradually
from .models import evaluate, load, load_adapter, save
from .models.quantizer import register_when_ready
from .narrowing import narrow
from .planning import plan
from .preconditioning import precondition
from .pretraining import parameter_groups, train
from .streaming import compress_folder
from .trainer import trainer_callback
from .training import heal, initialise, trainable_low_rank
from .using import adapters_of, remove_adapter, use

__version__ = "0.1.0"
__all__ = [
    "CalibrationError",
    "IntegerWeights",
    "Layerwise",
    "Optimizer",
    "Replicated",
    "Report",
    "StochasticRounding",
    "StructuredLinear",
    "absorb",
    "adapt",
    "adapters",
    "adapters_of",
    "allocators",
    "calibrate",
    "check_adapters",
    "compress",
    "compress_folder",
    "compress_gradually",
    "compressors",
    "estimate",
    "estimators",
    "evaluate",
    "export",
    "exporters",
    "finetune",
    "finish",
    "fisher_spectrum",
    "fold",
    "follow",
    "heal",
    "initialise",
    "initialisers",
    "inspect",
    "jacobian_spectrum",
    "layers",
    "lipschitz_bound",
    "load",
    "load_adapter",
    "matrices",
    "measures",
    "narrow",
    "optimizers",
    "parameter_groups",
    "plan",
    "precondition",
    "preconditioners",
    "projectors",
    "rank_rules",
    "remove_adapter",
    "save",
    "schedules",
    "starts",
    "tangent_kernel",
    "train",
    "train_as_floats",
    "train_as_integers",
    "trainable_low_rank",
    "trainer_callback",
    "use",
]

register_when_ready()
