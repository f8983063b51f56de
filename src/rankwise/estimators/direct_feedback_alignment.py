"""The error at the output, fed to each block by a fixed random matrix."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..linalg import gaussian, seeded
from .base import Draw, Estimator, check_gain
from .network import Network, Output


@dataclass(frozen=True, kw_only=True)
class DirectFeedbackAlignment(Estimator):
    """Send the error at the output to each block by a fixed random matrix (DFA), instead of through the others.

    In place of the gradient of the loss by a block's output h stands B e, where e is the gradient by the output
    of the network. Inside a block gradients are exact, through all steps of a recurrent layer, too. All blocks
    are kept until the error is known, so it saves no memory; but no block waits for the error of another.

    Args:
        projection: draws B (u, classes) for the u numbers of an output; its entries are divided by sqrt(u).
        gain: of B.
        seed: of all B.

    References: Nøkland, "Direct feedback alignment provides learning in deep neural networks", 2016, arXiv
        1609.01596. The scale of B is this project's own.
    """

    projection: Draw = gaussian
    gain: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_gain(self.gain)

    def backward(self, network: Network, inputs: Any, labels: Tensor) -> Tensor:
        """See :class:`Estimator`."""
        kept: list[Output] = []
        with network.cut(kept.append):
            output, loss = network.run(inputs, labels)
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"direct feedback needs a model that returns a tensor, got {type(output).__name__}."
                )
            if not output.requires_grad:
                raise ValueError("direct feedback needs something that is trained behind the last block.")
            (error,) = torch.autograd.grad(loss, output, retain_graph=True)
            signals = [self.signal(each, error) for each in kept]
            values = [each.values for each in kept]
            torch.autograd.backward([loss, *values], [None, *signals])  # here, as activations may be made again
        return loss.detach()

    def signal(self, output: Output, error: Tensor) -> Tensor:
        """Return B e in the shape of a block's output.

        Args:
            output: (b, positions..., m) of a block.
            error: (b, classes), or of each position (b, positions..., classes).
        """
        shape = output.values.shape
        if shape[: error.dim() - 1] != error.shape[:-1] or len(shape) < error.dim():
            raise ValueError(f"outputs {tuple(shape)} of a block do not fit errors {tuple(error.shape)}.")
        units = shape[error.dim() - 1 :].numel()
        matrix = self.projection(units, error.shape[-1], seeded(self.seed, *output.block)).to(error)
        return ((self.gain / units**0.5) * error @ matrix.mT).view(shape).to(output.values.dtype)
