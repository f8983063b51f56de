"""Fixed random matrices in place of the transposed weights of the backward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.conv import _ConvNd

from ..linalg import gaussian, seeded
from .base import Draw, Estimator, check_gain
from .network import CHANGED, Network, check_recorded, layers_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, kw_only=True)
class FeedbackAlignment(Estimator):
    """Send errors back through fixed random matrices instead of the transposed weights (FA).

    Linear layers and convolutions are treated so wherever they are in the model, all else as back-propagation
    does, such as ``nn.MultiheadAttention``, which calls no layers. Each layer's own gradient is formed as usual,
    of the error that arrives. It saves no memory.

    Args:
        projection: draws B (m, n), for a convolution of all inputs of an output; it is divided by sqrt(n).
        gain: of B.
        seed: of all B.

    References: Lillicrap, Cownden, Tweed, Akerman, "Random synaptic feedback weights support error
        backpropagation for deep learning", 2016. The scale of B is this project's own.
    """

    projection: Draw = gaussian
    gain: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_gain(self.gain)

    def backward(self, network: Network, inputs: Any, labels: Tensor) -> Tensor:
        """See :class:`Estimator`."""
        with self.feeding(network.model):
            loss = network.run(inputs, labels)[1]
            loss.backward()  # here, as activations may be computed again
        return loss.detach()

    @contextmanager
    def feeding(self, model: nn.Module) -> Iterator[None]:
        """Let graphs that are made inside send their errors through random matrices.

        Raises:
            ValueError: if layers are compressed or adapted.
        """
        if any(isinstance(layer, CHANGED) for layer in layers_of(model)):
            raise ValueError(
                "feedback alignment has matrices for ordinary layers alone, and this model has compressed, "
                "adapted or integer ones; fold it first, or take DirectFeedbackAlignment."
            )
        layers = [m for m in model.modules() if isinstance(m, (nn.Linear, *CONVOLUTIONS))]
        hooks = [hook for number, layer in enumerate(layers) for hook in self._hooks(number, layer)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def matrix(self, number: int, weight: Tensor) -> Tensor:
        """Return what stands for the weight of a layer in the backward pass."""
        inputs = weight[0].numel()
        drawn = self.projection(len(weight), inputs, seeded(self.seed, number))
        return drawn.to(weight).view_as(weight) * (self.gain / inputs**0.5)

    def _hooks(self, number: int, layer: nn.Linear | _ConvNd) -> tuple[Any, Any]:
        """Cut the layer off its input, and join both again by a way of errors."""
        inputs: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
            check_recorded(module)
            if len(args) != 1:
                raise ValueError(
                    f"feedback alignment needs layers that are called with one input, got {len(args)}."
                )
            inputs.append(args[0])
            return args[0].detach()

        def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs.pop()
            if not x.requires_grad:
                return output
            shape = x.shape
            return _Joined.apply(
                x, output, lambda error: _back(layer, self.matrix(number, layer.weight), shape, error)
            )

        return layer.register_forward_pre_hook(before), layer.register_forward_hook(after)


class _Joined(torch.autograd.Function):
    """The output of a layer, whose error goes to its parameters as it is, and to its input by another way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return output.clone()  # which what follows may write into

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore
        return ctx.back(error), error, None


def _back(layer: nn.Linear | _ConvNd, matrix: Tensor, shape: torch.Size, error: Tensor) -> Tensor:
    """Return the error of a layer's input, as if its weight were ``matrix``."""
    matrix = matrix.to(error.dtype)
    if isinstance(layer, nn.Linear):
        return error @ matrix
    with torch.enable_grad():  # for all strides and kinds of padding
        probe = error.new_zeros(()).expand(shape).requires_grad_()
        output = layer._conv_forward(probe, matrix, None)
    return torch.autograd.grad(output, probe, error)[0]
