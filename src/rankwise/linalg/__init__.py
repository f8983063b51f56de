"""Pure functions on tensors."""

from .categorical import draw_categorical
from .interpolative import interpolative_rows
from .metric import Metric, metric_norm, metric_svd, truncated_factors

__all__ = ["Metric", "draw_categorical", "interpolative_rows", "metric_norm", "metric_svd", "truncated_factors"]
