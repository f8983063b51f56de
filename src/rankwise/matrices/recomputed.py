"""A matrix that is written out for every product and forgotten in between."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .base import autocast_of
from .wrapper import Wrapper


class Recomputed(Wrapper):
    """The same matrix, multiplied in its dense form, which is made again for the gradient instead of being kept.

    For training: between the forward and the backward pass nothing of size m n is kept, only the input and what
    the matrix stores. Made for sparse terms, whose products are taken with the dense matrix anyway, and for more
    tokens than the rank, where one dense product is cheaper than several of factors. torch.compile decides for
    itself what it keeps. Gradients of gradients, and the transforms of ``torch.func``, are not available.

    Args:
        matrix: (m, n), of any kind.

    References: Han et al., "SLTrain", NeurIPS 2024, arXiv 2406.02214, for the sum of a sparse and a low-rank one.

    >>> import torch
    >>> from rankwise.matrices import LowRank
    >>> Recomputed(LowRank(torch.ones(3, 1), torch.ones(1, 2)))(torch.ones(2)).tolist()
    [2.0, 2.0, 2.0]
    """

    @property
    def macs(self) -> int:
        """Those of the dense matrix; writing it out is not counted."""
        return self.shape[0] * self.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        return product(self.matrix, x)

    def lookup(self, index: Tensor) -> Tensor:
        """(...) -> (..., m); what the matrix writes out for it is forgotten and made again, too."""
        return looked_up(self.matrix, index)


def product(matrix: Any, x: Tensor) -> Tensor:
    """Return x W' for a module whose ``dense()`` writes W out, without keeping W for the gradient."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return x @ matrix.dense().mT
    return _Product.apply(matrix, x, *matrix.parameters())


def looked_up(matrix: Any, index: Tensor) -> Tensor:
    """Return what ``matrix.lookup(index)`` does, without keeping for the gradient what it makes on the way."""
    if torch.compiler.is_compiling():
        return matrix.lookup(index)
    return checkpoint(matrix.lookup, index, use_reentrant=False, preserve_rng_state=False)


class _Product(torch.autograd.Function):
    """x W' with W from the parameters of a matrix, which are all that is kept beside x."""

    @staticmethod
    def forward(ctx: Any, matrix: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.matrix, ctx.device = matrix, x.device.type
        ctx.cast = autocast_of(x.device)
        ctx.save_for_backward(x, *parameters)
        return x @ matrix.dense().mT

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's doing)
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x, *parameters = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        cast = torch.autocast(ctx.device, ctx.cast) if ctx.cast is not None else contextlib.nullcontext()
        with cast, torch.enable_grad():
            leaves = [p.detach().requires_grad_(want) for p, want in zip(parameters, wanted, strict=True)]
            weight = _written_out(ctx.matrix, leaves)
            with torch.no_grad():
                dx = (dy @ weight).to(x.dtype) if ctx.needs_input_grad[1] else None
                slope = dy.reshape(-1, dy.shape[-1]).mT @ x.reshape(-1, x.shape[-1]) if any(wanted) else None
            asked = [leaf for leaf in leaves if leaf.requires_grad]
            found = iter(torch.autograd.grad(weight, asked, slope.to(weight.dtype)) if slope is not None else ())
        return None, dx, *(next(found) if want else None for want in wanted)


class _Writer(nn.Module):
    """A module that writes a matrix out, so that its parameters can be replaced for one call."""

    def __init__(self, matrix: nn.Module) -> None:
        super().__init__()
        self.matrix: Any = matrix

    def forward(self) -> Tensor:
        return self.matrix.dense()


def _written_out(matrix: nn.Module, parameters: list[Tensor]) -> Tensor:
    """Return the dense matrix with other values for its parameters."""
    writer = _Writer(matrix)
    names = (name for name, _ in writer.named_parameters())
    return torch.func.functional_call(writer, dict(zip(names, parameters, strict=True)))
