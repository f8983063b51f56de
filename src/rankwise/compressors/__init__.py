"""Methods that replace a weight by a smaller structured matrix; one a file."""

from .activation_aware_svd import ActivationAwareSvd
from .cospadi import CoSpaDi
from .fisher_svd import FisherSvd
from .gptq import Gptq
from .gptq_plus_low_rank import GptqPlusLowRank
from .kronecker_factored_pruning import KroneckerFactoredPruning
from .kronecker_factored_rounding import KroneckerFactoredRounding
from .kronecker_factored_svd import KroneckerFactoredSvd
from .lord import Lord
from .mfac_pruning import MFacPruning
from .mixed import Mixed
from .orthogonal_dictionary import OrthogonalDictionary
from .plain_svd import PlainSvd
from .sparse_plus_low_rank import SparsePlusLowRank
from .whitened_svd import WhitenedSvd

__all__ = [
    "ActivationAwareSvd",
    "CoSpaDi",
    "FisherSvd",
    "Gptq",
    "GptqPlusLowRank",
    "KroneckerFactoredPruning",
    "KroneckerFactoredRounding",
    "KroneckerFactoredSvd",
    "Lord",
    "MFacPruning",
    "Mixed",
    "OrthogonalDictionary",
    "PlainSvd",
    "SparsePlusLowRank",
    "WhitenedSvd",
]
