"""A model as blocks, each of which ends where an estimator may set a target or feed an error back."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..core.integer_weights import IntegerLinear
from ..core.surgery import StructuredLinear
from ..core.views import Conv2dView, EmbeddingView
from ..core.watch import call_of
from .recurrent import unrolled

Loss = Callable[[Any, Tensor], Tensor]
CHANGED = (StructuredLinear, IntegerLinear)
LAYERS = (nn.Linear, _ConvNd, nn.RNNBase, *CHANGED)
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
ACTIVATIONS = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.Mish,
    nn.PReLU,
    nn.ReLU,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softsign,
    nn.Tanh,
)

RECOMPUTED = (
    "activations are computed again in the backward pass, of which these gradients know nothing; turn gradient "
    "checkpointing off."
)


@dataclass(frozen=True)
class Block:
    """All that is computed after the block before, up to the output of a module.

    Args:
        name: of the module in the model.
        module: whose output ends the block.
        squash: the activation at the end, into whose range it maps.
        layout: where the output has its channels: it maps outputs to (b, positions..., m).
    """

    name: str
    module: nn.Module
    squash: Callable[[Tensor], Tensor]
    layout: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Output:
    """What a block has computed.

    Args:
        values: (b, positions..., m); of a recurrent layer that goes step by step (b, m).
        block: its number and, if it has several recurrent layers, the number of the layer.
        step: of a recurrent layer, or None.
        steps: how many there are.
    """

    values: Tensor
    block: tuple[int, int]
    step: int | None = None
    steps: int = 1


class Network:
    """A model, its blocks, and the loss behind them.

    Args:
        model: whose parameters that require gradients are trained.
        modules: whose outputs end blocks; None finds them, see :func:`ends_of`.
        loss: (output, labels) -> number.
        classes: the number of classes; None takes the width of the last layer.

    Raises:
        ValueError: if none is found, though more than the last layer trains, or one is no part of the model.
    """

    def __init__(
        self, model: nn.Module, modules: Sequence[nn.Module] | None, loss: Loss, classes: int | None
    ) -> None:
        self.model, self.loss = model, loss
        self.blocks = tuple(_blocks(model, ends_of(model) if modules is None else modules))
        if modules is None and not self.blocks and _trains_before(model):
            raise ValueError(
                "no blocks are found in this model, so that all would be back-propagation; give blocks=, modules "
                "whose outputs end blocks, or [] for none."
            )
        self._classes = classes

    @property
    def classes(self) -> int:
        """The number of classes.

        Raises:
            ValueError: if it is unknown.
        """
        last = next(reversed(layers_of(self.model)), None)
        found = self._classes or (last.out_features if isinstance(last, nn.Linear | StructuredLinear) else None)
        if found is None:
            raise ValueError("the last layer is not linear, so give classes=, the number of classes.")
        return found

    def codes(self, labels: Tensor) -> Tensor:
        """Return labels (...,) as one-hot rows (..., classes); labels that are floating are (..., d) already.

        Raises:
            ValueError: if a label is no class.
        """
        if labels.is_floating_point():
            return labels
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise ValueError(
                f"labels must lie in 0 ... {self.classes - 1}, got {int(labels.min())} ... {int(labels.max())}; "
                "leave out rows without a label, or give classes=."
            )
        return functional.one_hot(labels.long(), self.classes)

    def run(self, inputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Run the model, and return its output and the loss.

        Raises:
            FloatingPointError: if the loss is not finite.
            ValueError: if there are not as many labels as outputs, or the last layer is cut off the loss.
        """
        arguments, options = call_of(inputs, next(self.model.parameters()).device)
        output = self.model(*arguments, **options)
        if isinstance(output, Tensor) and output.shape[:1] != labels.shape[:1]:
            raise ValueError(f"outputs {tuple(output.shape)} need as many labels, got {tuple(labels.shape)}.")
        loss = self.loss(output, labels)
        if not bool(loss.detach().isfinite()):
            raise FloatingPointError(f"the loss is {float(loss.detach())}; take a lower lr, or drop this batch.")
        if not loss.requires_grad and any(
            p.requires_grad for m in layers_of(self.model)[-1:] for p in m.parameters()
        ):
            raise ValueError(
                "the loss depends on nothing that is trained behind the last block; give blocks=, what the model "
                "runs before its last layer, in that order."
            )
        return output, loss

    @contextmanager
    def cut(self, hear: Callable[[Output], None], *, by_step: bool = False) -> Iterator[None]:
        """Hand the output of each block to ``hear``, if it can be trained, and go on with it as a constant.

        Args:
            hear: may run a backward pass; its graph ends where the block before ended.
            by_step: let recurrent layers that are blocks hand over each step, with a constant state before.
        """
        undo = [layer.register_forward_pre_hook(check_recorded).remove for layer in layers_of(self.model)]
        hear = _once_at_a_time(hear)
        try:
            for number, block in enumerate(self.blocks):
                if by_step and isinstance(block.module, nn.RNNBase):
                    undo.append(_replaced(block.module, unrolled(block.module, _by_step(number, hear))))
                else:
                    undo.append(block.module.register_forward_hook(_whole(number, block, hear)).remove)
            yield
        finally:
            for each in reversed(undo):
                each()


def ends_of(model: nn.Module) -> list[nn.Module]:
    """Return what ends a block: each linear, convolutional or recurrent layer but the last in order.

    If an activation follows it in the same ``nn.Sequential``, directly or behind a normalisation, that ends it.
    """
    follower = {}
    for parent in model.modules():
        if isinstance(parent, nn.Sequential):
            parts = [part for part in parent if not isinstance(part, NORMS)]
            follower.update({id(a): b for a, b in pairwise(parts)})
    layers = layers_of(model)[:-1]
    behind = [follower.get(id(layer)) for layer in layers]
    return [each if isinstance(each, ACTIVATIONS) else layer for layer, each in zip(layers, behind, strict=True)]


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the linear, convolutional and recurrent layers, also those that are compressed or adapted.

    The one inside ``nn.MultiheadAttention`` is left out, since that reads its weight and never calls it.
    """
    found = (module for module in model.modules() if isinstance(module, LAYERS))
    return [
        each for each in found if not isinstance(each, NonDynamicallyQuantizableLinear) and not _is_table(each)
    ]


def _is_table(layer: nn.Module) -> bool:
    return isinstance(layer, StructuredLinear) and isinstance(layer.view, EmbeddingView)


def _trains_before(model: nn.Module) -> bool:
    """Whether a matrix is trained that is not of the last layer."""
    last = {id(p) for layer in layers_of(model)[-1:] for p in layer.parameters()}
    return any(p.dim() > 1 and p.requires_grad and id(p) not in last for p in model.parameters())


def _blocks(model: nn.Module, modules: Sequence[nn.Module]) -> Iterator[Block]:
    """Yield blocks in the order of ``modules``."""
    names = {id(module): name for name, module in model.named_modules()}
    order = list(model.modules())
    for module in modules:
        if id(module) not in names:
            raise ValueError(f"a {type(module).__name__} in blocks is no part of the model.")
        inside = list(module.modules())
        last = max(i for i, each in enumerate(order) if each in inside)
        layer = next((each for each in reversed(order[: last + 1]) if isinstance(each, LAYERS)), None)
        yield Block(names[id(module)], module, _squash(inside), _layout(layer, module))


def _squash(inside: list[nn.Module]) -> Callable[[Tensor], Tensor]:
    """Return the activation behind all parameters."""
    for part in reversed(inside):
        if isinstance(part, ACTIVATIONS):
            return part.forward  # without hooks
        if isinstance(part, nn.RNNBase):
            return torch.relu if part.mode == "RNN_RELU" else torch.tanh
        if any(True for _ in part.parameters()):
            break
    return lambda values: values


def _layout(layer: nn.Module | None, module: nn.Module) -> Callable[[Tensor], Tensor]:
    if isinstance(layer, _ConvNd) or (isinstance(layer, StructuredLinear) and isinstance(layer.view, Conv2dView)):
        return lambda values: values.movedim(1, -1)
    if isinstance(module, nn.RNNBase) and not module.batch_first:
        return lambda values: values.transpose(0, 1)
    return lambda values: values


def _whole(number: int, block: Block, hear: Callable[[Output], None]) -> Callable[..., Any]:
    """Return a forward hook."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        values = output[0] if isinstance(output, tuple) else output
        if values.requires_grad:
            hear(Output(block.layout(values), (number, 0)))
        return _constant(output)

    return hook


def check_recorded(module: nn.Module, args: Any = ()) -> None:
    """Raise ValueError if a module trains, but what it does now is not recorded for a backward pass."""
    if not torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
        raise ValueError(RECOMPUTED)


def _once_at_a_time(hear: Callable[[Output], None]) -> Callable[[Output], None]:
    """Refuse outputs that come while another is heard, from activations that are computed again."""
    heard: list[Output] = []

    def hear_one(output: Output) -> None:
        if heard:
            raise ValueError(RECOMPUTED)
        heard.append(output)
        try:
            hear(output)
        finally:
            heard.clear()

    return hear_one


def _by_step(number: int, hear: Callable[[Output], None]) -> Callable[[int, int, int, Tensor], None]:
    return lambda layer, step, steps, values: hear(Output(values, (number, layer), step, steps))


def _constant(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(map(_constant, output))
    return output.detach() if isinstance(output, Tensor) else output


def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Put another forward into a module; returns what takes it out."""
    before = vars(module).get("forward")
    module.forward = forward

    def undo() -> None:
        if before is None:
            del module.forward
        else:
            module.forward = before

    return undo
