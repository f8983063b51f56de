"""Gradients without back-propagation, for any optimiser; one method a file."""

from .direct_feedback_alignment import DirectFeedbackAlignment
from .feedback_alignment import FeedbackAlignment
from .target_projection import TargetProjection

__all__ = ["DirectFeedbackAlignment", "FeedbackAlignment", "TargetProjection"]
