"""What the layers of a model see while it trains: the inputs and output gradients of each sample."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..linalg import KhatriRao
from .conditioned import Conditioned
from .views import EmbeddingView, View


@dataclass(frozen=True)
class Rows:
    """What one layer saw on this process since the last step.

    Args:
        each: the samples' gradients, each of its own loss: the gradient of the mean is their mean.
        samples: N, by which means are taken. It may differ from ``len(each)`` where a layer sees something else
            than the samples of the model, such as the tokens that reached an expert.
    """

    each: KhatriRao
    samples: int


@dataclass(frozen=True)
class _Call:
    """One call of a layer that the loss depends on."""

    batch: int
    inputs: Tensor
    gradients: Tensor


class Capture:
    """Keeps the inputs and the output gradients of some layers while ``on``, from hooks on them.

    Calls of a layer within one run of the model belong to the same samples; further runs before :meth:`take`
    bring further samples. A run without gradients, or one that the loss does not depend on, leaves nothing.

    Args:
        model: whose first argument has the samples on its first axis.
        layers: none of them a slice of a 3-D parameter.
        reduces: :attr:`Preconditioner.reduces`.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Conditioned], *, reduces: bool = False) -> None:
        self.layers, self.reduces, self.on = layers, reduces, False
        self.calls: dict[str, list[_Call]] = {}
        self.batch, self.counts = 0, {0: 0}
        self._handles = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for name, layer in layers.items():
            for each in {id(each): each for each in map(model.get_submodule, layer.site.names)}.values():
                self._handles.append(each.register_forward_hook(self._called(name)))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def clear(self) -> None:
        """Forget what was seen."""
        self.calls.clear()
        self.batch, self.counts = 0, {0: 0}

    def take(self, scale: float = 1.0) -> dict[str, Rows]:
        """Return what the layers saw, in float32 or float64, and forget it.

        Args:
            scale: what the loss was multiplied by, as a gradient scaler does.
        """
        used = {call.batch for calls in self.calls.values() for call in calls}
        firsts = {call.batch: len(call.inputs) for calls in self.calls.values() for call in calls}
        counts = {batch: self.counts[batch] or firsts[batch] for batch in used}
        samples = sum(counts.values())
        found = {}
        for name, calls in self.calls.items():
            layer, view = self.layers[name], self.layers[name].site.view
            batches = [
                self._batch([call for call in calls if call.batch == batch], view, counts[batch])
                for batch in sorted({call.batch for call in calls})
            ]
            inputs, gradients = _stacked([x for x, _ in batches]), _stacked([g for _, g in batches])
            width = layer.shape[1] - (layer.bias is not None)
            each = KhatriRao(inputs, gradients * (samples / scale), width)
            found[name] = Rows(layer.with_bias(each), samples)
        self.clear()
        return found

    def _batch(self, calls: Sequence[_Call], view: View, samples: int) -> tuple[Tensor, Tensor]:
        """See the calls of one run as inputs and gradients; a single one as means and sums if that will do."""
        if self.reduces and len(calls) == 1 and len(calls[0].inputs) == samples:
            means, gradients = view.means(_wide(calls[0].inputs)), _wide(view.outputs(calls[0].gradients))
            if means is not None and bool((gradients != 0).any(-1).all()):
                return means[:, None], gradients.sum(1, keepdim=True)
        return _joined([_positions(call, view, samples) for call in calls])

    def _begin(self, model: nn.Module, args: Sequence[Any], options: Mapping[str, Any]) -> None:
        if self.on and torch.is_grad_enabled():
            given = [value for value in [*args, *options.values()] if isinstance(value, Tensor) and value.dim()]
            self.batch += 1
            self.counts[self.batch] = len(given[0]) if given else 0

    def _called(self, name: str) -> Any:
        def called(module: nn.Module, args: Sequence[Any], output: Tensor) -> None:
            if self.on and torch.is_grad_enabled() and output.requires_grad:
                batch, inputs = self.batch, args[0].detach()
                output.register_hook(lambda gradient: self._add(name, _Call(batch, inputs, gradient)))

        return called

    def _add(self, name: str, call: _Call) -> None:
        if self.on:
            self.calls.setdefault(name, []).append(call)


def _positions(call: _Call, view: View, samples: int) -> tuple[Tensor, Tensor]:
    """See a call as inputs (R, T, n), or (R, T) of tokens, and gradients (R, T, m).

    R is the number of samples if they are on the first axis, else each row is one by itself.
    """
    gradients = _wide(view.outputs(call.gradients))
    if isinstance(view, EmbeddingView):
        inputs, widths = call.inputs, ()
        if view.padding is not None:
            gradients = gradients * (inputs != view.padding)[..., None]
    else:
        inputs = view.inputs(call.inputs).to(gradients.dtype)
        widths = inputs.shape[-1:]
    rows = samples if gradients.dim() > 1 and len(gradients) == samples else gradients[..., 0].numel()
    return inputs.reshape(rows, -1, *widths), gradients.reshape(rows, -1, gradients.shape[-1])


def _wide(tensor: Tensor) -> Tensor:
    """Give a tensor type float32 or float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _joined(calls: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Put the positions of several calls about the same samples side by side."""
    if len(calls) == 1:
        return calls[0]
    if len({len(x) for x, _ in calls}) > 1:  # not the same samples: each row is one by itself
        calls = [(x.flatten(0, 1)[:, None], g.flatten(0, 1)[:, None]) for x, g in calls]
        return torch.cat([x for x, _ in calls]), torch.cat([g for _, g in calls])
    return torch.cat([x for x, _ in calls], 1), torch.cat([g for _, g in calls], 1)


def _stacked(batches: Sequence[Tensor]) -> Tensor:
    """Put samples below each other, filled up with zeros where they have fewer positions; a copy."""
    longest = max(batch.shape[1] for batch in batches)
    return torch.cat([batch if batch.shape[1] == longest else _filled(batch, longest) for batch in batches])


def _filled(batch: Tensor, positions: int) -> Tensor:
    zeros = batch.new_zeros(len(batch), positions - batch.shape[1], *batch.shape[2:])
    return torch.cat([batch, zeros], 1)
