"""What the layers of a model see while it trains: the inputs and output gradients of each sample."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..linalg import KhatriRao
from .conditioned import Conditioned
from .views import Conv2dView, EmbeddingView, View


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


@dataclass(eq=False)
class _Call:
    """One call of a layer, and the sum of the output gradients that backward passes brought it.

    Args:
        batch: number of the run of the model.
        samples: of that run, zero if unknown.
        alone: whether it was called without an axis of samples.
        rows: of its inputs.
        inputs: if they are wanted.
        version: how often these had been changed in place when it was called.
        gradients: none before the first.
    """

    batch: int
    samples: int
    alone: bool
    rows: int
    inputs: Tensor | None
    version: int
    gradients: Tensor | None = None


class Capture:
    """Keeps the inputs and the output gradients of the layers that are ``wanted``, from hooks on them.

    Calls of a layer within one run of the model belong to the same samples; further runs before :meth:`take`
    bring further samples. A run without gradients, or one that the loss does not depend on, leaves nothing.
    A run is about one sample if each layer is called without an axis of samples. Whatever makes gradients flow
    through the layers counts as a backward pass of the loss, ``torch.autograd.grad`` too.

    Args:
        model: whose first tensor has the samples on an axis.
        layers: none of them a slice of a 3-D parameter.
        axis: which one, in that tensor and in sequences (..., n) that layers see; images have them first.
        reduces: :attr:`Preconditioner.reduces`.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, Conditioned], axis: int = 0, *, reduces: bool = False
    ) -> None:
        if not isinstance(axis, int) or axis < 0:
            raise ValueError(f"axis must be a whole number >= 0, got {axis}.")
        self.layers, self.axis, self.reduces = layers, axis, reduces
        self.wanted: Collection[str] = ()
        self.calls: dict[str, list[_Call]] = {}  # of each layer
        self.used: dict[int, list[_Call]] = {}  # of each run
        self.batch, self.count = 0, 0  # the number of the last run, and its samples
        self._handles = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for name, layer in layers.items():
            for each in {id(each): each for each in map(model.get_submodule, layer.site.names)}.values():
                self._handles.append(each.register_forward_hook(self._called(name, each), with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks off, and forget what was seen."""
        for handle in self._handles:
            handle.remove()
        self.wanted = ()
        self.clear()

    def clear(self) -> None:
        """Forget what was seen."""
        self.calls.clear()
        self.used.clear()

    def take(self, scale: float = 1.0) -> dict[str, Rows]:
        """Return what the layers saw, in float32 or float64, and forget it.

        Args:
            scale: what the loss was multiplied by, as a gradient scaler does.
        """
        counts = self._counts()
        samples = sum(counts.values())
        found = {}
        for name, calls in self.calls.items():
            layer, view = self.layers[name], self.layers[name].site.view
            width = layer.shape[1] - (layer.bias is not None)
            batches = [
                layer.with_bias(KhatriRao(*self._batch(calls, batch, view, counts[batch]), width))
                for batch in sorted({call.batch for call in calls})
            ]
            inputs, gradients = _stacked([u.inputs for u in batches]), _stacked([u.gradients for u in batches])
            found[name] = Rows(KhatriRao(inputs, gradients * (samples / scale), batches[0].width), samples)
        self.clear()
        return found

    def samples(self) -> int:
        """Return N, the samples of the runs that the loss depends on, through whichever layers."""
        return sum(self._counts().values())

    def _counts(self) -> dict[int, int]:
        """Return the samples of each of these runs."""
        return {
            batch: 1 if all(call.alone for call in each) else each[0].samples or each[0].rows
            for batch, each in self.used.items()
        }

    def _batch(self, every: Sequence[_Call], batch: int, view: View, samples: int) -> tuple[Tensor, Tensor]:
        """See the calls of one run as inputs and gradients; a single one as means and sums if that will do."""
        pairs = [
            (call.inputs, call.gradients)
            for call in every
            if call.batch == batch and call.inputs is not None and call.gradients is not None
        ]
        if self.reduces and len(pairs) == 1 and len(pairs[0][0]) == samples:
            means, gradients = view.means(_wide(pairs[0][0])), _wide(view.outputs(pairs[0][1]))
            if means is not None and bool((gradients != 0).any(-1).all()):
                return means[:, None], gradients.sum(1, keepdim=True)
        return _joined([_positions(*pair, view, samples, self.axis) for pair in pairs])

    def _begin(self, model: nn.Module, args: Sequence[Any], options: Mapping[str, Any]) -> None:
        if self.wanted and torch.is_grad_enabled():
            given = next((tensor for tensor in _tensors([args, options]) if tensor.dim() > self.axis), None)
            self.batch += 1
            self.count = 0 if given is None else given.shape[self.axis]

    def _called(self, name: str, layer: nn.Module) -> Any:
        """Return the hook of a layer, which a copy of the layer has, too, and must not act in."""

        def called(module: nn.Module, args: Sequence[Any], options: Mapping[str, Any], output: Tensor) -> None:
            if module is layer and self.wanted and torch.is_grad_enabled() and output.requires_grad:
                inputs = next(_tensors([args, options])).detach()
                alone = _alone(inputs, self.layers[name].site.view)
                kept = inputs if name in self.wanted else None
                rows, version = 1 if alone else len(inputs), _version(inputs)
                call = _Call(self.batch, self.count, alone, rows, kept, version)
                output.register_hook(lambda gradient: self._add(name, call, gradient.detach()))

        return called

    def _add(self, name: str, call: _Call, gradient: Tensor) -> None:
        """Note a call that the loss depends on; a further backward pass through it adds to its gradient."""
        if not self.wanted:
            return
        if not any(call is each for each in self.used.setdefault(call.batch, [])):
            self.used[call.batch].append(call)
            call.gradients = None  # of a step before
        if name in self.wanted and call.inputs is not None:
            if _version(call.inputs) != call.version:
                raise RuntimeError(
                    f"the inputs of layer {name} were changed in place after it was called, so that nobody knows "
                    "what it saw; write x = x + y in place of x += y."
                )
            if call.gradients is None:
                self.calls.setdefault(name, []).append(call)
                call.gradients = gradient
            else:
                call.gradients = call.gradients + gradient


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors among arguments, first those without names."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors([*value.values()])
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place."""
    return 0 if tensor.is_inference() else tensor._version


def _alone(inputs: Tensor, view: View) -> bool:
    """Whether a layer was called without an axis of samples."""
    return inputs.dim() == (0 if isinstance(view, EmbeddingView) else 3 if isinstance(view, Conv2dView) else 1)


def _positions(seen: Tensor, gradients: Tensor, view: View, samples: int, axis: int) -> tuple[Tensor, Tensor]:
    """See a call as inputs (R, T, n), or (R, T) of tokens, and gradients (R, T, m).

    R is the number of samples if they are on an axis of their own, else each row is one by itself.
    """
    if _alone(seen, view):
        seen, gradients = seen[None], gradients[None]
    gradients = _wide(view.outputs(gradients))
    if isinstance(view, EmbeddingView):
        inputs, widths = seen, ()
        if view.padding is not None:
            gradients = gradients * (inputs != view.padding)[..., None]
    else:
        inputs = view.inputs(seen).to(gradients.dtype)
        widths = inputs.shape[-1:]
    if not isinstance(view, Conv2dView) and gradients.dim() > axis + 1 and gradients.shape[axis] == samples:
        inputs, gradients = inputs.movedim(axis, 0), gradients.movedim(axis, 0)
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
