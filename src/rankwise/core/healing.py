"""Training a few stored numbers of a model towards a reference."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .progress import track
from .running import Piece
from .statistics import Batch
from .targets import Target, target_of
from .watch import call_of, frozen


class Likeness(Piece):
    """A batch, and what the reference says about it; what is lowered is the divergence from that.

    Args:
        batch: as the models take it.
        target: what the reference says.
        autocast: run the model in this type.
    """

    def __init__(self, batch: Batch, target: Target, autocast: torch.dtype | None) -> None:
        self.batch, self.target, self.autocast = batch, target, autocast

    @property
    def rows(self) -> int:
        """How many rows the reference saw."""
        return self.target.rows

    def loss(self, model: nn.Module) -> Tensor:
        """Sum the divergence from the reference over the rows."""
        return self.target.divergence(output_of(model, self.batch, self.autocast), self.batch)


def likenesses(reference: nn.Module, batches: Sequence[Batch], autocast: torch.dtype | None) -> list[Piece]:
    """Ask a reference about some batches."""
    with frozen(reference), torch.no_grad():
        return [
            Likeness(batch, target_of(output_of(reference, batch, autocast), batch), autocast)
            for batch in track(batches, "the reference")
        ]


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
