"""Adam."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.kernels import kernel
from ..core.states import State, counter, per_parameter
from ..core.transforms import Transform


@dataclass(frozen=True, kw_only=True)
class Adam(Transform):
    """Divide a mean of gradients by the root of a mean of their squares, both without the bias of the start.

    With m <- b1 m + (1 - b1) g and v <- b2 v + (1 - b2) g^2, the direction of step t is
    m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps).

    Args:
        betas: b1 and b2.
        eps: added to the root, as in torch.
        early_eps: add it to sqrt(v) instead, before the bias is taken out of v.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    early_eps: bool = False

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers from 0 to below 1, got {self.betas}.")
        if not self.eps >= 0:
            raise ValueError(f"eps must be >= 0, got {self.eps}.")

    def init(self, param: Tensor, index: Tensor) -> State:
        """Two means, and the number of steps."""
        return {"step": counter(index), "mean": torch.zeros_like(param), "square": torch.zeros_like(param)}

    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """The direction (k, ...)."""
        b1, b2 = self.betas
        step = state["step"].add_(1).tolist()
        # the direction is mean / (root (1 - b1^t) / sqrt(1 - b2^t) + eps (1 - b1^t))
        scales = [(1 - b1**t) / math.sqrt(1 - b2**t) for t in step]
        added = [
            self.eps * (scale if self.early_eps else 1 - b1**t) for scale, t in zip(scales, step, strict=True)
        ]
        numbers = per_parameter(scales, grad), per_parameter(added, grad)
        return _direction(grad, state["mean"], state["square"], self.betas, *numbers)

    @property
    def elementwise(self) -> bool:
        """It is."""
        return True

    def rotate(self, state: State, rotation: Tensor) -> None:
        """Rotate the mean; treat the squares as variances of independent rows, plus the squared mean.

        References: Robert et al., "LDAdam", ICLR 2025, arXiv 2410.16103; where rounding or the two different
        time scales make a variance negative, it is zero here.
        """
        steps = state["step"].clamp_min(1).tolist()
        short, shorter = (per_parameter([1 - beta**t for t in steps], rotation) for beta in self.betas)
        mean, square = state["mean"], state["square"]
        variance = (square / shorter - (mean / short).square()).clamp_min_(0)
        mean.copy_(rotation @ mean)
        square.copy_((rotation.square() @ variance + (mean / short).square()) * shorter)


@kernel
def _direction(
    grad: Tensor, mean: Tensor, square: Tensor, betas: tuple[float, float], scale: Tensor, added: Tensor
) -> Tensor:
    """Write both means, and return mean / (root scale + added)."""
    mean.lerp_(grad, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    root = square.sqrt().mul_(scale).add_(added)
    return torch.div(mean, root, out=root)


def adam(*, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, early_eps: bool = False) -> Transform:
    """Adam; with the ``weight_decay`` of :class:`rankwise.Optimizer` it is AdamW.

    >>> import torch, rankwise
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = rankwise.Optimizer([([weight], adam())], lr=0.1)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> weight.tolist()
    [0.8999..., 0.8999...]

    Args:
        betas: how much of the means of gradients and of their squares stays at each step.
        eps: added to the root of the squares.
        early_eps: add it before the bias of the start is taken out of them, as GaLore's published code does: then
            it weighs up to 30 times more in the first steps.

    References: Kingma and Ba, 2015, arXiv 1412.6980; Loshchilov and Hutter, 2019, arXiv 1711.05101.
    """
    return Adam(betas=betas, eps=eps, early_eps=early_eps)
