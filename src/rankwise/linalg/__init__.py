"""Pure functions on tensors."""

from .categorical import draw_categorical
from .dictionary import orthogonal_dictionary
from .interpolative import interpolative_rows
from .metric import Metric, metric_norm, metric_svd, truncated_factors
from .packing import pack, packed_bytes, unpack
from .parabola import parabola
from .rounding import Rounded, choose_grids, nearest_codes, round_to_grid
from .splitting import Splitting, largest

__all__ = [
    "Metric",
    "Rounded",
    "Splitting",
    "choose_grids",
    "draw_categorical",
    "interpolative_rows",
    "largest",
    "metric_norm",
    "metric_svd",
    "nearest_codes",
    "orthogonal_dictionary",
    "pack",
    "packed_bytes",
    "parabola",
    "round_to_grid",
    "truncated_factors",
    "unpack",
]
