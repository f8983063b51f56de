"""What happens to adapters around each optimiser step. A saved adapter may name what ``__all__`` names."""

from .density_budget import DensityBudget
from .freeze_columns import FreezeColumns
from .sampled_vectors import SampledVectors
from .triplet_budget import TripletBudget

__all__ = ["DensityBudget", "FreezeColumns", "SampledVectors", "TripletBudget"]
