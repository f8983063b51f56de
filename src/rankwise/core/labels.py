"""Losses whose output gradients make the second moment S: which labels the model is held against.

With labels drawn from the model's own distribution the second moment of the gradients is the true Fisher
information; with the labels of the data it is the empirical one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional

from ..linalg import draw_categorical

UNLABELLED = -100  # stands where a token has no label

Labels = Callable[[Any, Any, Generator], Tensor]
"""(model output, batch, generator) -> loss, summed over tokens or samples."""


def automatic(output: Any, batch: Any, generator: Generator) -> Tensor:
    """Use :func:`sampled` where the output is logits, and :func:`gaussian` where it is features."""
    return (sampled if has_logits(output) else gaussian)(output, batch, generator)


def sampled(output: Any, batch: Any, generator: Generator) -> Tensor:
    """Draw each label from the model's own distribution: the true Fisher information."""
    logits = unpadded(logits_of(output), batch)
    with torch.no_grad():
        uniform = torch.rand(len(logits), 1, generator=generator).to(logits.device)
        drawn = draw_categorical(logits, uniform)[:, 0]
    return functional.cross_entropy(logits, drawn, reduction="sum")


def given(output: Any, batch: Any, generator: Generator) -> Tensor:
    """Take the labels of the data: the next token, or ``labels`` where the batch names them.

    For sequences sampled from the model itself these are also labels drawn from the model.
    """
    logits = logits_of(output)
    target = _targets(batch, logits.dim() == 3)
    logits = logits[:, :-1] if logits.dim() == 3 else logits
    return functional.cross_entropy(
        logits.flatten(0, -2), target.flatten().to(logits.device), ignore_index=UNLABELLED, reduction="sum"
    )


def count_given(batch: Any) -> int:
    """Count the labels that :func:`given` finds; ids or labels of shape (b, t) are of sequences."""
    if isinstance(batch, Mapping):
        sequences = batch["labels" if "labels" in batch else "input_ids"].dim() == 2
    else:
        sequences = isinstance(batch, Tensor) or (batch[0].dim() == 2 and not batch[0].is_floating_point())
    return int((_targets(batch, sequences) != UNLABELLED).sum())


def _targets(batch: Any, sequences: bool) -> Tensor:
    """Return the labels of the data, of each token but the first where the logits are of sequences."""
    if isinstance(batch, Mapping) and "labels" in batch:
        return batch["labels"][:, 1:] if sequences else batch["labels"]
    if sequences:
        ids = (
            batch["input_ids"] if isinstance(batch, Mapping) else batch if isinstance(batch, Tensor) else batch[0]
        )
        target = ids[:, 1:]
        if isinstance(batch, Mapping) and batch.get("attention_mask") is not None:
            target = target.masked_fill(~batch["attention_mask"][:, 1:].bool(), UNLABELLED)
        return target
    if isinstance(batch, Sequence):
        return batch[1]
    raise ValueError("labels of the data were asked for, but a batch has none: give (inputs, labels).")


def gaussian(output: Any, batch: Any, generator: Generator) -> Tensor:
    """Hold features against themselves plus unit Gaussian noise: the Fisher information of a regression.

    All floating-point tensors of the output count, such as an encoder's hidden states and its pooled ones.
    """
    rows = torch.cat([each.flatten() for each in features_of(output, batch)])
    return (rows * torch.randn(rows.shape, generator=generator).to(rows.device)).sum()


def features_of(output: Any, batch: Any) -> list[Tensor]:
    """Return every floating-point tensor of a model's output in float32 without padding, each (t, k)."""
    outputs = [output] if isinstance(output, Tensor) else list(output.values())
    return [unpadded(e.float(), batch) for e in outputs if isinstance(e, Tensor) and e.is_floating_point()]


def has_logits(output: Any) -> bool:
    """Whether an output is logits or names some; a lone tensor counts as logits."""
    return isinstance(output, Tensor) or "logits" in output


def logits_of(output: Any) -> Tensor:
    """Return the logits of a model's output in float32.

    Raises:
        ValueError: if it has none.
    """
    if isinstance(output, Tensor):
        return output.float()
    if "logits" not in output:
        raise ValueError("the model's output has no logits; use the labels 'gaussian' for features.")
    return output["logits"].float()


def unpadded(rows: Tensor, batch: Any) -> Tensor:
    """Flatten (..., k) to (t, k), without what the batch's ``attention_mask`` marks as padding."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None and mask.shape == rows.shape[:-1]:
        return rows[mask.bool().to(rows.device)]
    return rows.flatten(0, -2)
