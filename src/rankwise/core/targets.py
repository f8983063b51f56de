"""What a reference model says about a batch, kept small, and how far another model is from it."""

import abc
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

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
        kept = min(kept, logits.shape[1])
        classes = torch.cat([_top(rows, kept) for rows in logits.split(_ROWS)])
        total = logits.logsumexp(-1)
        rest = None
        if kept < logits.shape[1]:
            rest = logits.scatter(1, classes, -torch.inf).logsumexp(-1) - total
        return cls(classes.int(), logits.gather(1, classes) - total[:, None], rest)

    @property
    def rows(self) -> int:
        """How many rows were seen."""
        return len(self.classes)

    def divergence(self, output: Any, batch: Any) -> Tensor:
        """Sum KL(reference || model) over the rows."""
        logits = unpadded(output if isinstance(output, Tensor) else output["logits"], batch)
        rest = None if self.rest is None else self.rest.to(logits.device)
        divergence: Any = _Divergence.apply(
            logits, self.classes.to(logits.device), self.logs.to(logits.device), rest
        )
        return divergence


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


class _Divergence(torch.autograd.Function):
    """Sum of KL(p || q) over rows; a few rows at a time, with the gradient made on the way.

    With q the softmax of the logits, P and Q what p and q give to the classes that are not kept, the gradient by
    a logit is q_i - p_i for a kept class and q_i (1 - P / Q) for another.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, classes: Tensor, logs: Tensor, rest: Tensor | None) -> Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for low in range(0, len(logits), _ROWS):
            rows = slice(low, low + _ROWS)
            q, kept = logits[rows].to(logs.dtype).softmax(-1), classes[rows].long()
            p, known = logs[rows].exp(), q.gather(1, kept)
            total += (p * torch.where(p > 0, logs[rows] - _log(known), 0.0)).sum()
            if rest is not None:
                others, share = q.scatter_(1, kept, 0.0).sum(-1), rest[rows].exp()
                total += (share * torch.where(share > 0, rest[rows] - _log(others), 0.0)).sum()
                q *= (1 - share / others.clamp_min(_tiny(q)))[:, None]
            if gradient is not None:
                gradient[rows] = q.scatter_(1, kept, known - p)
        ctx.save_for_backward(*[] if gradient is None else [gradient])
        return total.to(logs.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.saved_tensors[0] * grads[0].to(ctx.saved_tensors[0]), None, None, None


def _top(values: Tensor, k: int, width: int = 16) -> Tensor:
    """Return where the k largest of each row are; they lie in the k blocks with the largest maxima."""
    if values.shape[1] <= k * width:
        return values.topk(k).indices
    padded = functional.pad(values, (0, -values.shape[1] % width), value=-torch.inf)
    blocks = padded.unflatten(1, (-1, width))
    chosen = blocks.amax(-1).topk(k).indices
    found = blocks.gather(1, chosen[:, :, None].expand(-1, -1, width)).flatten(1).topk(k).indices
    return chosen.gather(1, found // width) * width + found % width


_ROWS = 64  # what is made of so many rows at a time stays in a cache


def _log(q: Tensor) -> Tensor:
    """Logarithm of a probability that may have become zero by rounding."""
    return q.clamp_min(_tiny(q)).log()


def _tiny(q: Tensor) -> float:
    return torch.finfo(q.dtype).tiny
