"""What ranks are worth to each layer of an adapted model."""

from .explained_variance import ExplainedVariance
from .predicted_decrease import PredictedDecrease
from .spectral_energy import SpectralEnergy

__all__ = ["ExplainedVariance", "PredictedDecrease", "SpectralEnergy"]
