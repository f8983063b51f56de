"""Methods that replace a weight by a smaller structured matrix; one a file."""

from .activation_aware_svd import ActivationAwareSvd
from .fisher_svd import FisherSvd
from .kronecker_factored_svd import KroneckerFactoredSvd
from .plain_svd import PlainSvd
from .whitened_svd import WhitenedSvd

__all__ = ["ActivationAwareSvd", "FisherSvd", "KroneckerFactoredSvd", "PlainSvd", "WhitenedSvd"]
