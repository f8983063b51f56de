"""What happens to adapters around each optimiser step. A saved adapter may name what ``__all__`` names."""

from .freeze_columns import FreezeColumns
from .sampled_vectors import SampledVectors
from .triplet_budget import TripletBudget

__all__ = ["FreezeColumns", "SampledVectors", "TripletBudget"]
