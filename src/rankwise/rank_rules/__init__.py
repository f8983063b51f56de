"""What ranks are worth to each layer of an adapted model."""

from .explained_variance import ExplainedVariance

__all__ = ["ExplainedVariance"]
