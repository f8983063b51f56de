"""What can be said about one weight matrix without data; one measure a file."""

from .condition_number import ConditionNumber
from .effective_rank import EffectiveRank
from .marchenko_pastur import MarchenkoPastur
from .spectrum_tail import SpectrumTail
from .stable_rank import StableRank

__all__ = ["ConditionNumber", "EffectiveRank", "MarchenkoPastur", "SpectrumTail", "StableRank"]
