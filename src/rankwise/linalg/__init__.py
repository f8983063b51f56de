"""Pure functions on tensors."""

from .brain_surgeon import damage_of_each, grouped, independent, saliency
from .categorical import draw_categorical
from .column_elimination import eliminate_columns, refit_columns
from .cosine import cosine_rows, cosine_transform
from .dictionary import learned_dictionary, orthogonal_dictionary
from .dynamic_codes import decode, dynamic_table, encode
from .entries import fit_entries
from .gradient_window import GradientWindow
from .interpolative import interpolative_rows
from .k_svd import k_svd
from .kernels import distance, inner
from .khatri_rao import KhatriRao, Sharing, exact, expanded, reduced
from .masks import draw_places, largest, largest_in_groups
from .metric import Metric, metric_norm, metric_svd, truncated_factors
from .newton_schulz import MUON, POLAR_EXPRESS, newton_schulz, odd_polynomials, odd_range
from .orthonormal import draw_normal, orthonormal, power_steps, product, seeded
from .packing import pack, pack_fitting, packed_bytes, unpack
from .parabola import log_parabola
from .principal import principal_components
from .recompression import recompressed
from .rounding import Rounded, choose_grids, nearest_codes, round_to_grid
from .scaled_plus_low_rank import damped_root, solve_root
from .shrinking import hard, magnitude, smallest_kept, soft
from .sparse_coding import matching_pursuit
from .sparse_plus_low_rank import sparse_plus_low_rank
from .spectral_norm import leading_pair, spectral_bound
from .splitting import Splitting
from .stochastic import add_to_integers, integer_grid, stochastic_bfloat16

__all__ = [
    "MUON",
    "POLAR_EXPRESS",
    "GradientWindow",
    "KhatriRao",
    "Metric",
    "Rounded",
    "Sharing",
    "Splitting",
    "add_to_integers",
    "choose_grids",
    "cosine_rows",
    "cosine_transform",
    "damage_of_each",
    "damped_root",
    "decode",
    "distance",
    "draw_categorical",
    "draw_normal",
    "draw_places",
    "dynamic_table",
    "eliminate_columns",
    "encode",
    "exact",
    "expanded",
    "fit_entries",
    "grouped",
    "hard",
    "independent",
    "inner",
    "integer_grid",
    "interpolative_rows",
    "k_svd",
    "largest",
    "largest_in_groups",
    "leading_pair",
    "learned_dictionary",
    "log_parabola",
    "magnitude",
    "matching_pursuit",
    "metric_norm",
    "metric_svd",
    "nearest_codes",
    "newton_schulz",
    "odd_polynomials",
    "odd_range",
    "orthogonal_dictionary",
    "orthonormal",
    "pack",
    "pack_fitting",
    "packed_bytes",
    "power_steps",
    "principal_components",
    "product",
    "recompressed",
    "reduced",
    "refit_columns",
    "round_to_grid",
    "saliency",
    "seeded",
    "smallest_kept",
    "soft",
    "solve_root",
    "sparse_plus_low_rank",
    "spectral_bound",
    "stochastic_bfloat16",
    "truncated_factors",
    "unpack",
]
