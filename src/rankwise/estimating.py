"""The verb that writes gradients which back-propagation did not find."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .core.finite import is_finite
from .estimators.base import Estimator
from .estimators.network import Loss, Network


class Estimation:
    """Writes the gradients of a model, as an estimator finds them; made by :func:`estimate`.

    Args:
        network: the model and its blocks.
        estimator: how to find gradients.
    """

    def __init__(self, network: Network, estimator: Estimator) -> None:
        self.network, self.estimator = network, estimator

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of the modules whose outputs end blocks."""
        return tuple(block.name for block in self.network.blocks)

    def backward(self, inputs: Any, labels: Tensor) -> Tensor:
        """Add to the ``.grad`` of all trained parameters, as ``loss.backward()`` does.

        Args:
            inputs: what the model is called with: a tensor, a tuple, or a mapping.
            labels: classes (b,), or floating targets (b, d); of each position (b, t) or (b, t, d).

        Returns:
            the loss at the output, detached.

        Raises:
            FloatingPointError: if a loss is not finite; some gradients may be written then.
            ValueError: if inputs or labels are not finite, or do not fit each other, and nothing was written; or
                if the model does not fit the estimator.
        """
        for name, value in (("inputs", inputs), ("labels", labels)):
            if not _finite(value):
                raise ValueError(f"{name} hold numbers that are not finite; drop this batch.")
        with torch.enable_grad():
            return self.estimator.backward(self.network, inputs, labels)


def estimate(
    model: nn.Module,
    estimator: Estimator,
    *,
    loss: Loss = functional.cross_entropy,
    blocks: Sequence[nn.Module] | None = None,
    classes: int | None = None,
) -> Estimation:
    """Find gradients by another way than back-propagation; any optimiser steps along them.

    Between backward passes the model is an ordinary one: nothing stays in it, and nothing has to be removed. It
    knows one process: with several, average the gradients after ``backward``.

    Args:
        model: trained where parameters require gradients.
        estimator: from :mod:`rankwise.estimators`.
        loss: (output, labels) -> number, a mean over the batch.
        blocks: modules whose outputs end blocks, in order; behind the last the loss itself trains. None
            takes each linear, convolutional or recurrent layer, also if compressed or adapted, but the last of
            ``model.modules()``, together with the activation that follows it in the same ``nn.Sequential``.
        classes: their number; None takes the width of the last layer.

    Returns:
        what has ``backward(inputs, labels)``.

    Raises:
        TypeError: if ``estimator`` is none.
        ValueError: if nothing can be trained, no block is found though more than the last layer trains, or one is
            no part of the model.

    >>> import rankwise
    >>> net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    >>> handle = estimate(net, rankwise.estimators.TargetProjection())
    >>> loss = handle.backward(torch.ones(4, 8), torch.tensor([0, 1, 2, 0]))
    >>> optimizer.step()
    >>> handle.blocks
    ('1',)
    """
    if not isinstance(estimator, Estimator):
        raise TypeError(f"estimator must be an object from rankwise.estimators, got {estimator!r}.")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("no parameter of the model requires a gradient, so there is nothing to estimate.")
    return Estimation(Network(model, blocks, loss, classes), estimator)


def _finite(value: Any) -> bool:
    """Whether all tensors in it are finite."""
    if isinstance(value, Tensor):
        return is_finite(value)
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    return all(map(_finite, value)) if isinstance(value, (tuple, list)) else True
