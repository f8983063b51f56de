"""Which rows of a batch count: those of padding do not, and some statistics are of tokens with labels alone."""

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from .labels import UNLABELLED, written


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


class Paddings:
    """Of both sequences of an encoder-decoder, which are told apart while it runs; of the only one of others."""

    def __init__(self) -> None:
        self.written = Padding()  # by the model, or its only sequence
        self.read = Padding()  # by an encoder beside a decoder
        self.encoding = False  # whether that encoder runs
        self.encoded: weakref.ref[Tensor] | None = None  # its last hidden states, which the decoder is given

    def begin(self, named: Mapping[str, Any]) -> None:
        """Start a batch of keyword arguments."""
        self.written, self.read = Padding.of(written(named)), Padding(Padding.of(named).mask)

    @contextlib.contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Follow which sequence a model works on."""
        with contextlib.ExitStack() as hooks:
            if (encoder := encoder_of(model)) is not None:
                hooks.enter_context(encoder.register_forward_pre_hook(self._encode))
                hooks.enter_context(encoder.register_forward_hook(self._hand_over))
            yield

    def of(self, x: Tensor) -> Padding:
        """That of the sequence which the inputs of a layer belong to."""
        is_read = self.encoding or (self.encoded is not None and self.encoded() is x)
        return self.read if is_read else self.written

    def _encode(self, *_: Any) -> None:
        self.encoding = True

    def _hand_over(self, _: nn.Module, inputs: Any, output: Any) -> None:
        self.encoding = False
        self.encoded = weakref.ref(output[0])


def encoder_of(model: nn.Module) -> nn.Module | None:
    """Return the encoder that stands beside a decoder in a model of transformers; other models have none."""
    part: Any
    for part in model.modules():
        if getattr(getattr(part, "config", None), "is_encoder_decoder", False) and hasattr(part, "get_encoder"):
            return part.get_encoder()
    return None
