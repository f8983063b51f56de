"""Ways to spend one budget on many layers; each is a function of ladders and a budget."""

from .greedy import greedy
from .thresholds import relative_error, spectrum_threshold
from .uniform import uniform
from .water_filling import water_filling

__all__ = ["greedy", "relative_error", "spectrum_threshold", "uniform", "water_filling"]
