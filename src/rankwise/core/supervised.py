"""Batches with labels, as pieces of data to train on."""

from collections.abc import Callable, Mapping

import torch
from torch import Generator, Tensor, nn

from .healing import output_of
from .labels import Labels, count_given, given, in_place, named, unlabelled
from .running import Piece
from .statistics import Batch


class Supervised(Piece):
    """A batch with labels.

    Args:
        batch: see :func:`rankwise.finetune`.
        loss: (model output, batch, generator) -> loss, summed over the labels.
        autocast: run the model in this type.
        ahead: whether labels (b, t) are held against the logits one position before them.
        note: is told the number of labels whenever the loss is computed.

    Raises:
        ValueError: if there is no label.
    """

    def __init__(
        self,
        batch: Batch,
        loss: Labels,
        autocast: torch.dtype | None,
        ahead: bool,
        note: Callable[[int], None] = lambda labels: None,
    ) -> None:
        self.batch, self.compute, self.autocast, self.note = batch, loss, autocast, note
        self.told = named(batch) if loss in (given, in_place) else batch  # what the loss is told
        self.count = count_given(named(batch), ahead)
        if self.count == 0:
            raise ValueError("a batch has no label that counts; leave it out.")

    @property
    def rows(self) -> int:
        """How many labels there are."""
        return self.count

    @property
    def size(self) -> int:
        """How many numbers its largest tensor has."""
        values = self.batch.values() if isinstance(self.batch, Mapping) else self.batch
        return max(value.numel() for value in [self.batch, *values] if isinstance(value, Tensor))

    def samples(self, axis: int = 0) -> int:
        """How many there are on an axis of the first tensor that has it."""
        values = self.batch.values() if isinstance(self.batch, Mapping) else self.batch
        tensors = [self.batch] if isinstance(self.batch, Tensor) else [v for v in values if isinstance(v, Tensor)]
        return max(1, next((each.shape[axis] for each in tensors if each.dim() > axis), 1))

    def loss(self, model: nn.Module) -> Tensor:
        """Sum the loss over the labels."""
        self.note(self.count)
        output = output_of(model, unlabelled(self.batch), self.autocast)
        return self.compute(output, self.told, Generator())
