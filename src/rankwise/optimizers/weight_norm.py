"""Rows of matrices trained as a direction and a length, without parameters of their own."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.combining import by_shape
from ..core.states import State
from ..core.subspaces import check_unread
from ..core.transforms import Transform
from .adam import adam


@dataclass(frozen=True, kw_only=True)
class WeightNorm(Transform):
    """Step V and g in W_i = g_i V_i / |V_i|, for the rows i of matrices (k, m, n), instead of W.

    V begins as W. With u = V_i / |V_i| the gradient of g_i is G_i u, that of V_i is c_i (G_i - (G_i u) u) with
    c_i = g_i / |V_i|, so that V = W / c needs no copy: c is kept, and W - lr c d is c times V after a step d.
    Then rows get their new lengths. Weight decay acts on V and g, as it would on parameters. A row of zeros has
    no direction: it takes the steps of V itself until it has one.

    Args:
        direction: of the steps of V; must not read parameters.
        magnitude: of the steps of g (k, m).

    References: Salimans and Kingma, "Weight normalization", 2016, arXiv 1602.07868.
    """

    direction: Transform
    magnitude: Transform
    exact: ClassVar[tuple[str, ...]] = ("scale", "length", "change")

    def init(self, param: Tensor, index: Tensor) -> State:
        """The states of both, c, and what is known of the lengths between a step and its end."""
        lengths = param[..., 0]
        for part in (self.direction, self.magnitude):
            check_unread(part, "on directions and lengths")
        return {
            "direction": self.direction.init(param, index),
            "magnitude": self.magnitude.init(lengths, index),
            "scale": torch.ones_like(lengths),
            "length": torch.zeros_like(lengths),
            "change": torch.zeros_like(lengths),
        }

    @property
    def reads_param(self) -> bool:
        """Always."""
        return True

    @property
    def constrains(self) -> bool:
        """Always."""
        return True

    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """(k, m, n) -> (k, m, n)."""
        weight, scale = param.to(grad.dtype), state["scale"]
        length = state["length"].copy_(weight.norm(dim=-1)).copysign_(scale)
        unit = torch.where(length == 0, 0.0, 1 / length)[..., None] * weight
        along = (grad * unit).sum(-1)
        shape = torch.empty_like(grad, device="meta")
        low = scale[..., None] * (grad - along[..., None] * unit)
        step = self.direction.update(low, state["direction"], shape)
        state["change"].copy_(self.magnitude.update(along, state["magnitude"], shape[..., 0]))
        return step * scale[..., None]

    def constrain(self, param: Tensor, state: State, lr: float, weight_decay: float) -> Tensor:
        """Give rows (k, m, n) their new lengths; what comes in is c times the new V."""
        scale, length = state["scale"], state["length"]
        now = param.norm(dim=-1)
        wanted = length * (1 - lr * weight_decay) - lr * state["change"]
        still = (length == 0) | (now == 0) | (wanted == 0)
        factor = torch.where(still, 1.0, wanted / now.copysign(scale))
        scale.mul_(factor)
        return param * factor[..., None]


def weight_norm(
    *,
    inner: Transform = adam(),  # noqa: B008 (frozen)
    magnitude: Transform = adam(),  # noqa: B008 (frozen)
    other: Transform = adam(),  # noqa: B008 (frozen)
) -> Transform:
    """Train each row of a matrix as a direction and a length, as if the model were parametrised so.

    With ``inner=galore(...)`` it is what the second algorithm of GradNormLoRP's code means to do for whole
    weights: as published it forgets the lengths it learns, makes NaN of rows of zeros, and keeps a copy of each
    weight.

    >>> type(weight_norm().matrix).__name__
    'WeightNorm'

    Args:
        inner: of the steps of directions; must not read parameters.
        magnitude: of the steps of lengths.
        other: for vectors and scalars.

    References: Salimans and Kingma, "Weight normalization", 2016, arXiv 1602.07868; Huang et al., 2025,
        arXiv 2412.19616.
    """
    return by_shape(matrix=WeightNorm(direction=inner, magnitude=magnitude), other=other)
