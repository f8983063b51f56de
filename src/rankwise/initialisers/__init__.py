"""Where low-rank updates begin."""

from .gradient_svd import GradientSvd
from .normal_outputs import NormalOutputs
from .principal_inputs import PrincipalInputs
from .singular_vectors import SingularVectors
from .uniform import Uniform

__all__ = ["GradientSvd", "NormalOutputs", "PrincipalInputs", "SingularVectors", "Uniform"]
