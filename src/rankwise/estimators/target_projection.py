"""A random code of the label as the target of each block, learned by forward passes alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..core.methods import check_count
from ..linalg import gaussian, seeded
from .base import Draw, Estimator, check_gain
from .network import Network, Output

POOLS = {1: functional.adaptive_avg_pool1d, 2: functional.adaptive_avg_pool2d, 3: functional.adaptive_avg_pool3d}


def difference(values: Tensor, targets: Tensor) -> Tensor:
    """The gradient of half the squared distance."""
    return values - targets


def sign(values: Tensor, targets: Tensor) -> Tensor:
    """The gradient of the sum of absolute differences; it needs a rate about five times lower."""
    return (values - targets).sign()


@dataclass(frozen=True, kw_only=True)
class TargetProjection(Estimator):
    """Train each block to send inputs to a random code of their label (tpSGD), and the rest by the true loss.

    A block with output h has the target t = s(gain P y), with y the one-hot label, P fixed and random, and s the
    activation at the end of the block, so that targets lie in its range. The gradient of a distance of h and t is
    computed at once, with the block's inputs as constants, and the graph is dropped: what is kept for it does not
    grow with depth. Nor does it with time: recurrent layers have targets at each step, and the state before a
    step is a constant.

    No two blocks may share what is trained before them, as in a transformer queries, keys and the way around them
    do: there ``blocks`` must be modules that hold whole residual branches, such as the model's layers.

    It descends no loss of the whole network, whose training loss may rise, and blocks lose what their label does
    not need; so depth hurts. Recurrent layers, which have to remember, learn far less than by back-propagation
    here (docs/results.md), where the paper claims to be within 5 %. How the paper projects targets of maps, when
    recurrent layers have them, and how it scales them is not verified; s(gain P y) is this project's own.

    Args:
        error: (h, t) -> the gradient by h of their distance: ``difference``, ``sign``, or another.
        projection: draws P (u, classes), such as :func:`rankwise.linalg.gaussian` or ``orthogonal``.
        gain: of P; of 1 and 3 the default was better for dense networks on MNIST, and 1 for convolutions.
        cells: outputs at many positions, such as convolutions', with one label are averaged to this many cells
            along each axis, each of which has its own target; 1 is the mean, None takes all positions.
        steps: how many last steps of a recurrent layer have a target; None means all.
        share: of the units of a block that have a target; the others stay as they are, a random memory of what
            the label does not say, which recurrent layers profit from. Less than 1 is this project's own.
        seed: of all P.

    References: Lomnitz, Daniels, Zhang, Piacentino, "Learning with local gradients at the edge", 2022, arXiv
        2208.08503.
    """

    error: Callable[[Tensor, Tensor], Tensor] = difference
    projection: Draw = gaussian
    gain: float = 3.0
    cells: int | None = 1
    steps: int | None = None
    share: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_gain(self.gain)
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}.")
        for name in ("cells", "steps"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))

    def backward(self, network: Network, inputs: Any, labels: Tensor) -> Tensor:
        """See :class:`Estimator`.

        Raises:
            ValueError: if two blocks are computed from the same trained operations, when some gradients are
                written.
        """
        codes = network.codes(labels)

        def learn(output: Output) -> None:
            if output.step is not None and self.steps is not None and output.steps - output.step > self.steps:
                return
            block = network.blocks[output.block[0]]
            values, error = self.aim(output, codes, block.squash)
            if not bool(error.isfinite().all()):
                raise FloatingPointError(
                    f"outputs of {block.name} are not finite; take a lower lr, or drop this batch. The gradients "
                    "of the blocks before it are written: call zero_grad."
                )
            values.backward(error)

        with _one_block_each():
            with network.cut(learn, by_step=True):
                loss = network.run(inputs, labels)[1]
            if loss.requires_grad:  # the last layer may be frozen
                loss.backward()
        return loss.detach()

    def aim(self, output: Output, codes: Tensor, squash: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return what of a block's output has targets, (b, ..., u), and the gradient of its distance from them.

        That is the mean over a batch and, of a step, its share of the mean over steps.

        Args:
            output: of the block.
            codes: one-hot labels (b, classes) or, of positions or steps, (b, positions..., classes).
            squash: the activation.

        Raises:
            ValueError: if there are not as many labels as outputs.
        """
        values = output.values
        if output.step is not None and codes.dim() == 3:
            if codes.shape[1] != output.steps:
                raise ValueError(f"sequences of {output.steps} steps need as many labels, got {codes.shape[1]}.")
            codes = codes[:, output.step]
        values = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
        if codes.shape[:-1] != values.shape[: codes.dim() - 1] or values.dim() < codes.dim():
            raise ValueError(
                f"outputs {tuple(values.shape)} of a block need labels for a batch of {len(values)}, or for each "
                f"position of it; got {tuple(codes.shape[:-1])}."
            )
        aimed = values[..., : max(1, round(self.share * values.shape[-1]))]
        values = self._pooled(aimed, values.dim() - codes.dim())
        generator = seeded(self.seed, *output.block)
        matrix = self.gain * self.projection(values.shape[-1], codes.shape[-1], generator).to(values)
        with torch.no_grad():
            steps = output.steps if self.steps is None else min(self.steps, output.steps)
            targets = squash(codes.to(values) @ matrix.mT)
            return values, self.error(values, targets) / (steps * values[..., 0].numel())

    def _pooled(self, values: Tensor, axes: int) -> Tensor:
        """(b, ..., m) -> (b, ..., u): see ``cells``; the ``axes`` before the last are those of positions."""
        if axes == 0:
            return values
        if self.cells is None:
            return values.flatten(-axes - 1)
        if self.cells == 1:
            return values.mean(tuple(range(-axes - 1, -1)))
        if axes > 3:
            raise ValueError(f"outputs with {axes} axes of positions have no cells; take cells=1 or None.")
        batch = values.shape[: values.dim() - axes - 1]
        maps = values.flatten(0, len(batch) - 1).movedim(-1, 1)
        return POOLS[axes](maps, self.cells).flatten(1).unflatten(0, batch)


@contextmanager
def _one_block_each() -> Iterator[None]:
    """Say what to do where the graph that one block has dropped is needed by another."""
    try:
        yield
    except RuntimeError as error:
        if "graph a second time" not in str(error):
            raise
        raise ValueError(
            "two blocks are computed from the same trained operations, whose graph the first has dropped; give "
            "blocks=, modules that hold whole residual branches, such as a transformer's layers. Some gradients "
            "are written: call zero_grad."
        ) from error
