"""Where low-rank updates begin."""

from .principal_inputs import PrincipalInputs
from .singular_vectors import SingularVectors
from .uniform import Uniform

__all__ = ["PrincipalInputs", "SingularVectors", "Uniform"]
