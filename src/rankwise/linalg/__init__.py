"""Pure functions on tensors."""

from .interpolative import interpolative_rows
from .metric import Metric, metric_norm, metric_svd, truncated_factors

__all__ = ["Metric", "interpolative_rows", "metric_norm", "metric_svd", "truncated_factors"]
