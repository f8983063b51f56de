"""Training a few stored numbers of a model towards a reference."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .modes import frozen
from .running import Piece
from .statistics import Batch
from .targets import Target, target_of
from .watch import call_of


class Likeness(Piece):
    """A batch, and what a reference says about it; what is lowered is the divergence from that.

    The reference is asked when the batch is first used.

    Args:
        batch: as the models take it.
        reference: a model.
        autocast: run the models in this type.
    """

    def __init__(self, batch: Batch, reference: nn.Module, autocast: torch.dtype | None) -> None:
        self.batch, self.reference, self.autocast = batch, reference, autocast

    @cached_property
    def target(self) -> Target:
        """What the reference says."""
        with frozen(self.reference), torch.no_grad():
            return target_of(output_of(self.reference, self.batch, self.autocast), self.batch)

    @property
    def rows(self) -> int:
        """How many rows the reference saw."""
        return self.target.rows

    def loss(self, model: nn.Module) -> Tensor:
        """Sum the divergence from the reference over the rows."""
        return self.target.divergence(output_of(model, self.batch, self.autocast), self.batch)


def output_of(model: nn.Module, batch: Batch, autocast: torch.dtype | None) -> Any:
    """Run a model on a batch, in another type if one is given."""
    device = next(model.parameters()).device
    arguments, options = call_of(batch, device)
    with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        return model(*arguments, **options)


@contextmanager
def still(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Let the gradients of the trained parameters alone be computed, in evaluation mode (no dropout)."""
    with frozen(model):
        for parameter in trained.values():
            parameter.requires_grad_(True)
        yield
