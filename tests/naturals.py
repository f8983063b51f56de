"""Natural gradients from the dense Fisher matrix, for tests of preconditioning."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def natural(layer: nn.Module, losses: Sequence[Tensor], damping: float, plain: Tensor | None = None) -> Tensor:
    """Solve the system of one layer, with its parameters as one vector.

    Args:
        layer: whose parameters have all their gradients from ``losses``.
        losses: of the samples, each by itself.
        damping: is added.
        plain: what is multiplied; None means the mean of the samples' gradients.
    """
    parameters = [*layer.parameters()]
    each = [
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        for loss in losses
    ]
    u = torch.stack([torch.cat([g.flatten() for g in gradients]) for gradients in each])
    fisher = u.mT @ u / len(u) + damping * torch.eye(u.shape[1], dtype=u.dtype)
    return torch.linalg.solve(fisher, u.mean(0) if plain is None else plain)


def gradient(layer: nn.Module) -> Tensor:
    """The gradients that a layer has, as one vector."""
    return torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None])
