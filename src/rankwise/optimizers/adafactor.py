"""Second moments kept as one number a row and one a column."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.combining import chain
from ..core.states import State, counter, per_parameter
from ..core.transforms import Transform
from .sgd import Momentum


@dataclass(frozen=True, kw_only=True)
class FactoredScale(Transform):
    """Divide gradients by the root of a mean of squares, of which only row and column sums are kept.

    At step t the means R of rows and C of columns of g^2 + tiny move by 1 - b_t = t^-decay; v = R C / mean(R).
    Vectors keep all of v. Where the root mean square of g / sqrt(v) is above ``clip``, it is brought down to it.

    Args:
        decay: how fast the means forget less and less.
        tiny: added to squares.
        clip: the largest root mean square of a direction.
    """

    decay: float = 0.8
    tiny: float = 1e-30
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1 or not self.tiny > 0 or not self.clip > 0:
            raise ValueError(f"decay must be in (0, 1], tiny and clip above 0, got {self}.")

    def init(self, param: Tensor, index: Tensor) -> State:
        """Means of rows and columns, or of all entries."""
        if param.ndim < 3:
            return {"step": counter(index), "square": torch.zeros_like(param)}
        rows, columns = param.new_zeros(param.shape[:-1]), param.new_zeros(len(param), param.shape[-1])
        return {"step": counter(index), "rows": rows, "columns": columns}

    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """The direction (k, ...)."""
        fresh = [t**-self.decay for t in state["step"].add_(1).tolist()]
        square = grad.square() + self.tiny
        if grad.ndim < 3:
            direction = grad * _mix(state["square"], square, fresh).rsqrt()
        else:
            rows = _mix(state["rows"], square.mean(-1), fresh)
            columns = _mix(state["columns"], square.mean(-2), fresh)
            share = (rows / rows.mean(-1, keepdim=True)).rsqrt()
            direction = grad * share[..., None] * columns.rsqrt()[..., None, :]
        size = direction.square().reshape(len(grad), -1).mean(-1).sqrt()
        return direction / (size / self.clip).clamp_min_(1).view(-1, *[1] * (grad.ndim - 1))


def _mix(mean: Tensor, value: Tensor, fresh: list[float]) -> Tensor:
    """Move a mean towards a value by a part of the way, one for each parameter."""
    return mean.lerp_(value, per_parameter(fresh, mean).expand_as(mean))


@dataclass(frozen=True, kw_only=True)
class RelativeSize(Transform):
    """Multiply directions by the root mean square of the parameter, or by ``least`` if that is more.

    Args:
        least: so that parameters leave zero.
    """

    least: float = 1e-3

    def __post_init__(self) -> None:
        if not self.least > 0:
            raise ValueError(f"the least size must be above 0, got {self.least}.")

    @property
    def reads_param(self) -> bool:
        """Its size."""
        return True

    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """(k, ...) -> (k, ...)."""
        size = param.to(grad.dtype).flatten(1).square().mean(1).sqrt() if param.ndim > 1 else param.to(grad).abs()
        return grad * size.clamp_min(self.least).view(-1, *[1] * (grad.ndim - 1))


def adafactor(
    *,
    beta: float = 0.0,
    decay: float = 0.8,
    clip: float = 1.0,
    relative: bool = False,
    least: float | None = None,
) -> Transform:
    """Adafactor with the learning rate of the optimiser: second moments take one number a row and a column.

    >>> import torch
    >>> from rankwise.core.transforms import state_bytes
    >>> state_bytes(adafactor(), torch.zeros(30, 70))  # 100 numbers and a counter
    408

    Args:
        beta: of a mean of the directions, which takes a number an entry; none if zero.
        decay: how fast second moments forget less and less.
        clip: the largest root mean square of a direction.
        relative: multiply directions by the root mean square of the parameter, as in the paper; lr is then a
            share of it. Not for what runs inside a projection, which sees no parameters.
        least: what such a root mean square is at least; None means 1e-3.

    Raises:
        ValueError: if an argument is out of range, or ``least`` is given where nothing is relative.

    References: Shazeer and Stern, 2018, arXiv 1804.04235; with ``relative`` and an lr of min(0.01, 1 / sqrt(t))
    it is that of the paper, and that of ``torch.optim.Adafactor``.
    """
    parts: list[Transform] = [FactoredScale(decay=decay, clip=clip)]
    if relative:
        parts.append(RelativeSize() if least is None else RelativeSize(least=least))
    elif least is not None:
        raise ValueError(
            f"only relative steps have a least size, so least={least} would do nothing; leave it out."
        )
    if beta:
        parts.append(Momentum(beta=beta, average=True))
    return chain(*parts)
