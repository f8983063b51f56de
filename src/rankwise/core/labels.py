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
    """Use :func:`sampled` where the output is logits, and :func:`gaussian` where it is features or one number."""
    classes = has_logits(output) and logits_of(output).shape[-1] > 1
    return (sampled if classes else gaussian)(output, batch, generator)


def sampled(output: Any, batch: Any, generator: Generator) -> Tensor:
    """Draw each label from the model's own distribution: the true Fisher information."""
    logits = unpadded(logits_of(output), batch)
    with torch.no_grad():
        uniform = torch.rand(len(logits), 1, generator=generator).to(logits.device)
        drawn = draw_categorical(logits, uniform)[:, 0]
    return functional.cross_entropy(logits, drawn, reduction="sum")


def given(output: Any, batch: Any, generator: Generator) -> Tensor:
    """Take the labels of the data: ``labels`` where the batch names them, else the next tokens.

    Labels of sequences, (b, t), are held against the logits one position before them, as those of causal language
    models; the verbs take :func:`in_place` instead for all other models. For sequences sampled from the model
    itself these are also labels drawn from the model. Labels that are no integers are of a model with one output,
    and the loss is half of the squared error.
    """
    return _entropy(output, batch, ahead=True)


def in_place(output: Any, batch: Any, generator: Generator) -> Tensor:
    """Take the labels of the data as :func:`given`, but hold ``labels`` against the logits in their own place.

    So do taggers, masked language models, and decoders that are given the tokens before each.
    """
    return _entropy(output, batch, ahead=False)


def named(batch: Any) -> Any:
    """Call the last of several arguments the labels; other batches stay as they are."""
    several = isinstance(batch, Sequence) and len(batch) > 1
    return {"labels": batch[-1]} if several else batch


def unlabelled(batch: Any) -> Any:
    """Return a batch without ``labels``, or without the last of several arguments: what a model is given."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key != "labels"}
    several = isinstance(batch, Sequence) and len(batch) > 1
    return batch[:-1] if several else batch


def written(batch: Any) -> Any:
    """Return what a model's output is held against: of an encoder-decoder, what its decoder is given."""
    names = [name for name in batch if name.startswith("decoder_")] if isinstance(batch, Mapping) else []
    if not names:
        return batch
    read = ("input_ids", "attention_mask", *names)
    others = {key: value for key, value in batch.items() if key not in read}
    return others | {name.removeprefix("decoder_"): batch[name] for name in names}


def count_given(batch: Any, ahead: bool) -> int:
    """Count the labels that :func:`given` finds, or :func:`in_place` where they are not ahead.

    Labels of shape (b, t) are of sequences, and so is what has none.
    """
    sequences = not _has_labels(batch) or batch["labels"].dim() == 2
    return int((_targets(batch, sequences, ahead) != UNLABELLED).sum())


def _entropy(output: Any, batch: Any, ahead: bool) -> Tensor:
    logits = logits_of(output)
    sequences = logits.dim() == 3
    target = _targets(batch, sequences, ahead)
    if sequences and (ahead or not _has_labels(batch)):
        logits = logits[:, :-1]
    if target.numel() != logits[..., 0].numel():
        raise ValueError(
            f"there are {target.numel()} labels for logits of shape {tuple(logits.shape)}, which need one for "
            "each row of classes; give such labels, or a loss of your own."
        )
    if target.is_floating_point():
        if logits.shape[-1] > 1:
            raise ValueError("labels of several classes are integers; give such, or a loss of your own.")
        return (logits.flatten() - target.flatten().to(logits.device)).square().sum() / 2
    return functional.cross_entropy(
        logits.flatten(0, -2), target.flatten().to(logits.device), ignore_index=UNLABELLED, reduction="sum"
    )


def _has_labels(batch: Any) -> bool:
    return isinstance(batch, Mapping) and "labels" in batch


def _targets(batch: Any, sequences: bool, ahead: bool) -> Tensor:
    """Return the labels of the data, of each token but the first where they are ahead of the logits."""
    batch = written(batch)
    if _has_labels(batch):
        return batch["labels"][:, 1:] if sequences and ahead else batch["labels"]
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

    All floating-point tensors of the output count, such as hidden states and pooled ones, but for a loss and for
    those of an encoder that a decoder reads.
    """
    rows = torch.cat([each.flatten() for each in features_of(output, batch)])
    return (rows * torch.randn(rows.shape, generator=generator).to(rows.device)).sum()


def features_of(output: Any, batch: Any) -> list[Tensor]:
    """Return every floating-point tensor of a model's output in float32 without padding, each (t, k)."""
    if isinstance(output, Tensor):
        outputs = [output]
    else:
        named = output.items() if isinstance(output, Mapping) else [("", each) for each in output]
        outputs = [each for name, each in named if not name.startswith("encoder_")]
    tensors = [each for each in outputs if isinstance(each, Tensor) and each.is_floating_point()]
    return [unpadded(each.float(), batch) for each in tensors if each.dim()]


def has_logits(output: Any) -> bool:
    """Whether an output is logits or names some; a lone tensor counts as logits."""
    return isinstance(output, Tensor) or "logits" in output


def logits_of(output: Any) -> Tensor:
    """Return the logits of a model's output in float32, (..., classes).

    Those of images, (b, classes, h, w), have the classes in front, as torch's losses want them.

    Raises:
        ValueError: if it has none.
    """
    if not has_logits(output):
        raise ValueError("the model's output has no logits; use the labels 'gaussian' for features.")
    logits = output if isinstance(output, Tensor) else output["logits"]
    return (logits.movedim(1, -1) if logits.dim() > 3 else logits).float()


def unpadded(rows: Tensor, batch: Any) -> Tensor:
    """Flatten (..., k) to (t, k), without what the batch marks as padding.

    That is its ``attention_mask``, or ``decoder_attention_mask`` where a decoder is given tokens of its own.
    """
    mask = written(batch).get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None and mask.shape == rows.shape[:-1]:
        return rows[mask.bool().to(rows.device)]
    return rows.reshape(-1, rows.shape[-1])
