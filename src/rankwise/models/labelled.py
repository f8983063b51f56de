"""Where the labels of a model's sequences stand."""

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..core.labels import UNLABELLED, Labels, given, in_place
from ..core.statistics import Batch
from .causal import continues_texts


def are_ahead(model: nn.Module) -> bool:
    """Whether labels are held against the logits one position before them, as those of a causal language model.

    Such is a model, or what is wrapped in it, that transformers can generate with, unless it has an encoder.
    """
    outermost = _of_transformers(model)
    return outermost is not None and continues_texts(outermost)


def placed(loss: Labels, model: nn.Module, batches: Sequence[Batch]) -> Labels:
    """Return the loss, where it is :func:`given` the one that holds labels where the model's stand.

    Raises:
        ValueError: if the model would learn to repeat its tokens.
    """
    if loss is not given or are_ahead(model):
        return loss
    outermost: Any = _of_transformers(model)
    own_tokens = outermost is None or not outermost.config.is_encoder_decoder
    if own_tokens and batches and all(map(_repeats, batches)):
        raise ValueError(
            f"the labels are the tokens that {type(model).__name__} is given, in the same places, and it is no "
            "causal language model of transformers; leave them out to learn the next tokens, or give a loss."
        )
    return in_place


def by_name(loss: Labels, model: nn.Module, batches: Sequence[Batch]) -> list[Batch]:
    """Give arguments their names, where the last of several is labels; other batches stay as they are."""

    def called(batch: Batch) -> Batch:
        if isinstance(batch, (Tensor, Mapping)) or len(batch) < 2:
            return batch
        return {**inspect.signature(model.forward).bind(*batch[:-1]).arguments, "labels": batch[-1]}

    return [called(batch) for batch in batches] if loss in (given, in_place) else [*batches]


def check_decoder(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Raise unless a decoder beside an encoder is given what stands before its labels.

    Raises:
        ValueError: if it would have to guess that from labels, which are not handed to it.
    """
    outermost: Any = _of_transformers(model)
    if outermost is None or not outermost.can_generate() or not outermost.config.is_encoder_decoder:
        return
    decoded = ("decoder_input_ids", "decoder_inputs_embeds")
    named = [batch for batch in batches if isinstance(batch, Mapping) and "labels" in batch]
    if any(all(batch.get(name) is None for name in decoded) for batch in named):
        raise ValueError(
            f"{type(outermost).__name__} is given no labels while it trains; add decoder_input_ids to the "
            "batches, for instance of its prepare_decoder_input_ids_from_labels."
        )


def _of_transformers(model: nn.Module) -> nn.Module | None:
    """Return the outermost model of transformers."""
    transformers = sys.modules.get("transformers")  # not there where no model is one of its
    if transformers is None:
        return None
    return next((part for part in model.modules() if isinstance(part, transformers.PreTrainedModel)), None)


def _repeats(batch: Batch) -> bool:
    """Whether all labels of a batch are token ids at the same positions."""
    if isinstance(batch, Mapping):
        ids, labels = batch.get("input_ids"), batch.get("labels")
    elif isinstance(batch, Tensor) or len(batch) < 2:
        return False
    else:
        ids, labels = batch[0], batch[-1]
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or ids.shape != labels.shape:
        return False
    return ids.dim() == 2 and not ids.is_floating_point() and bool((ids == labels)[labels != UNLABELLED].all())
