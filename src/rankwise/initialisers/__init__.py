"""Where low-rank updates begin."""

from .gradient_svd import GradientSvd
from .principal_inputs import PrincipalInputs
from .singular_vectors import SingularVectors
from .uniform import Uniform

__all__ = ["GradientSvd", "PrincipalInputs", "SingularVectors", "Uniform"]
