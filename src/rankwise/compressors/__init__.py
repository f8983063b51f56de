"""Methods that replace a weight by a smaller structured matrix; one a file."""

from .activation_aware_svd import ActivationAwareSvd
from .fisher_svd import FisherSvd
from .gptq import Gptq
from .gptq_plus_low_rank import GptqPlusLowRank
from .kronecker_factored_pruning import KroneckerFactoredPruning
from .kronecker_factored_rounding import KroneckerFactoredRounding
from .kronecker_factored_svd import KroneckerFactoredSvd
from .mixed import Mixed
from .orthogonal_dictionary import OrthogonalDictionary
from .plain_svd import PlainSvd
from .whitened_svd import WhitenedSvd

__all__ = [
    "ActivationAwareSvd",
    "FisherSvd",
    "Gptq",
    "GptqPlusLowRank",
    "KroneckerFactoredPruning",
    "KroneckerFactoredRounding",
    "KroneckerFactoredSvd",
    "Mixed",
    "OrthogonalDictionary",
    "PlainSvd",
    "WhitenedSvd",
]
