"""Which rows of a batch count: those of padding do not, and some statistics are of tokens with labels alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from .labels import UNLABELLED


@dataclass(frozen=True)
class Padding:
    """Of one sequence of tokens a sample.

    Args:
        mask: (b, t) bool, the tokens that are no padding; None for all.
        answers: (b, t) bool, those among them that have a label; None where that is not known.
    """

    mask: Tensor | None = None
    answers: Tensor | None = None

    @classmethod
    def of(cls, named: Mapping[str, Any]) -> Self:
        """Take ``attention_mask``, and ``labels`` (b, t), of which -100 is none."""
        mask, labels = named.get("attention_mask"), named.get("labels")
        mask = None if mask is None else mask.bool()
        answers = None if labels is None or labels.dim() != 2 else labels != UNLABELLED
        if answers is not None and mask is not None and mask.shape == answers.shape:
            answers = answers & mask
        return cls(mask, answers)

    def rows(self, x: Tensor, *, answers: bool = False) -> Tensor:
        """Flatten (..., k) to (t, k) without padding; the rows of all sequences may be together already.

        Args:
            x: what a layer is given.
            answers: also without tokens that have no label.
        """
        for mask in (self.answers if answers else None, self.mask):
            if mask is not None and x.shape[:-1] in (mask.shape, (mask.numel(),)):
                return x.flatten(0, -2)[mask.flatten().to(x.device)]
        return x.reshape(-1, x.shape[-1])
