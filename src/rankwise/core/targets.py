"""What a reference model says about a batch, kept small, and how far another model is from it."""

import abc
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .labels import features_of, has_logits, logits_of, unpadded


class Target(abc.ABC):
    """What the reference says about the rows (tokens, samples) of one batch."""

    @property
    @abc.abstractmethod
    def rows(self) -> int:
        """How many rows were seen."""

    @abc.abstractmethod
    def divergence(self, output: Any, batch: Any) -> Tensor:
        """Return how far a model's output is from the reference, summed over the rows."""


@dataclass(frozen=True)
class Probabilities(Target):
    """The likeliest classes of each row, and how likely all others are together.

    The divergence is KL(reference || model) in nats with the other classes taken as one: a lower bound of the
    full divergence, and equal to it where all classes are kept.

    Args:
        classes: (t, k) int32.
        logs: (t, k), log-probabilities of these.
        rest: (t,), log-probability of all others, or None where there are none.
    """

    classes: Tensor
    logs: Tensor
    rest: Tensor | None

    @classmethod
    def of(cls, logits: Tensor, kept: int) -> "Probabilities":
        """Keep at most ``kept`` classes of (t, c) logits."""
        top = logits.log_softmax(-1).topk(min(kept, logits.shape[1]))
        rest = None
        if kept < logits.shape[1]:
            rest = logits.scatter(1, top.indices, -torch.inf).logsumexp(-1) - logits.logsumexp(-1)
        return cls(top.indices.int(), top.values, rest)

    @property
    def rows(self) -> int:
        """How many rows were seen."""
        return len(self.classes)

    def divergence(self, output: Any, batch: Any) -> Tensor:
        """Sum KL(reference || model) over the rows."""
        logits = unpadded(logits_of(output), batch)
        classes = self.classes.long().to(logits.device)
        total = logits.logsumexp(-1)
        sums = _divergence(self.logs.to(logits.device), logits.gather(1, classes) - total[:, None]).sum()
        if self.rest is not None:
            others = logits.scatter(1, classes, -torch.inf).logsumexp(-1) - total
            sums = sums + _divergence(self.rest.to(logits.device), others).sum()
        return sums


@dataclass(frozen=True)
class Features(Target):
    """All floating-point outputs of a model without logits; the divergence is half the squared distance.

    Args:
        values: each (t, k).
    """

    values: tuple[Tensor, ...]

    @property
    def rows(self) -> int:
        """How many rows the first output has."""
        return len(self.values[0])

    def divergence(self, output: Any, batch: Any) -> Tensor:
        """Sum half the squared distance over the rows."""
        pairs = zip(features_of(output, batch), self.values, strict=True)
        return torch.stack([(ours - theirs.to(ours.device)).square().sum() / 2 for ours, theirs in pairs]).sum()


def target_of(output: Any, batch: Any, kept: int = 256) -> Target:
    """Remember an output of the reference: the likeliest classes where it is logits, else all features."""
    if has_logits(output):
        return Probabilities.of(unpadded(logits_of(output), batch), kept)
    return Features(tuple(features_of(output, batch)))


def _divergence(logs: Tensor, others: Tensor) -> Tensor:
    """Return p (log p - log q), which is zero where p is."""
    return logs.exp() * torch.where(logs.isneginf(), 0.0, logs - others)
