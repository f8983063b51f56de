"""Pure functions on tensors."""

from .brain_surgeon import damage_of_each, grouped, independent, saliency
from .categorical import draw_categorical
from .column_elimination import eliminate_columns, refit_columns
from .cosine import cosine_rows, cosine_transform
from .dictionary import learned_dictionary, orthogonal_dictionary
from .dynamic_codes import decode, dynamic_table, encode
from .entries import fit_entries
from .feedback import feedback_factors, feedback_range, gradient_factors
from .gradient_window import GradientWindow
from .importance import draw_important, importance_scales
from .interpolative import interpolative_rows
from .k_svd import k_svd
from .kernels import distance, inner
from .khatri_rao import KhatriRao, Sharing, averaged, exact, expanded, reduced, with_gradient
from .kronecker_basis import KroneckerBasis, eigen
from .kronecker_solver import Jointly, KroneckerSolver, Separately, balanced, both
from .lanczos import lanczos
from .masks import draw_places, largest, largest_in_groups
from .mean_field import critical_variances, gradient_gain, preactivation_variance
from .metric import Metric, metric_norm, metric_svd, truncated_factors
from .newton_schulz import MUON, POLAR_EXPRESS, newton_schulz, odd_polynomials, odd_range
from .orthonormal import draw_normal, orthonormal, power_steps, product, seeded
from .packing import pack, pack_fitting, packed_bytes, spread, unpack
from .parabola import falling, log_linear, log_parabola
from .pivoted_cholesky import Interpolation, pivoted_cholesky
from .principal import principal_components
from .random_matrices import gaussian, orthogonal
from .recompression import recompressed
from .rounding import Rounded, choose_grids, nearest_codes, round_to_grid
from .scaled_plus_low_rank import damped_root, solve_root
from .shrinking import hard, magnitude, smallest_kept, soft
from .sparse_coding import matching_pursuit
from .sparse_plus_low_rank import sparse_plus_low_rank
from .spectral_norm import leading_pair, spectral_bound
from .splitting import Splitting
from .stiefel import cayley, stiefel_tangent
from .stochastic import add_to_integers, integer_grid, stochastic_bfloat16
from .symmetric_eigen import symmetric_eigen
from .triangles import fold_symmetric, from_triangles, to_triangle, unfold_symmetric

__all__ = [
    "MUON",
    "POLAR_EXPRESS",
    "GradientWindow",
    "Interpolation",
    "Jointly",
    "KhatriRao",
    "KroneckerBasis",
    "KroneckerSolver",
    "Metric",
    "Rounded",
    "Separately",
    "Sharing",
    "Splitting",
    "add_to_integers",
    "averaged",
    "balanced",
    "both",
    "cayley",
    "choose_grids",
    "cosine_rows",
    "cosine_transform",
    "critical_variances",
    "damage_of_each",
    "damped_root",
    "decode",
    "distance",
    "draw_categorical",
    "draw_important",
    "draw_normal",
    "draw_places",
    "dynamic_table",
    "eigen",
    "eliminate_columns",
    "encode",
    "exact",
    "expanded",
    "falling",
    "feedback_factors",
    "feedback_range",
    "fit_entries",
    "fold_symmetric",
    "from_triangles",
    "gaussian",
    "gradient_factors",
    "gradient_gain",
    "grouped",
    "hard",
    "importance_scales",
    "independent",
    "inner",
    "integer_grid",
    "interpolative_rows",
    "k_svd",
    "lanczos",
    "largest",
    "largest_in_groups",
    "leading_pair",
    "learned_dictionary",
    "log_linear",
    "log_parabola",
    "magnitude",
    "matching_pursuit",
    "metric_norm",
    "metric_svd",
    "nearest_codes",
    "newton_schulz",
    "odd_polynomials",
    "odd_range",
    "orthogonal",
    "orthogonal_dictionary",
    "orthonormal",
    "pack",
    "pack_fitting",
    "packed_bytes",
    "pivoted_cholesky",
    "power_steps",
    "preactivation_variance",
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
    "spread",
    "stiefel_tangent",
    "stochastic_bfloat16",
    "symmetric_eigen",
    "to_triangle",
    "truncated_factors",
    "unfold_symmetric",
    "unpack",
    "with_gradient",
]
