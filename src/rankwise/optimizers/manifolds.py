"""Steps along a set of matrices: directions that are tangent to it, and the way back to it."""

import abc
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.states import State
from ..core.transforms import Transform


class Manifold(abc.ABC):
    """A set of matrices (k, m, n) of one Frobenius norm."""

    @abc.abstractmethod
    def size(self, shape: torch.Size) -> float:
        """Return the Frobenius norm of its matrices (k, m, n)."""

    @abc.abstractmethod
    def tangent(self, values: Tensor, point: Tensor) -> Tensor:
        """Return the part of ``values`` (k, m, n) that is along the set at ``point``."""

    @abc.abstractmethod
    def retract(self, moved: Tensor, start: Tensor | None) -> Tensor:
        """Bring (k, m, n) back to the set; ``start`` is where a step began, if ``needs_start``."""

    @property
    def needs_start(self) -> bool:
        """Whether ``retract`` reads where a step began."""
        return False


@dataclass(frozen=True, kw_only=True)
class TangentMomentum(Transform):
    """Momentum that goes along: M <- P(beta M + g), where P projects on what is tangent to where it is now.

    Args:
        manifold: has the projection; parameters are its members.
        beta: how much stays at each step.
    """

    manifold: Manifold
    beta: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must be from 0 to below 1, got {self.beta}.")

    def init(self, param: Tensor, index: Tensor) -> State:
        """The sum."""
        return {"momentum": torch.zeros_like(param)}

    @property
    def reads_param(self) -> bool:
        """Always."""
        return True

    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """(k, m, n) -> (k, m, n)."""
        momentum = state["momentum"].mul_(self.beta).add_(grad)
        return momentum.copy_(self.manifold.tangent(momentum, param))


def moving(manifold: Manifold, beta: float | None, inner: Transform | None) -> Transform:
    """Return what makes steps of tangent gradients: ``inner``, or momentum where that is None.

    Raises:
        ValueError: if both are given.
    """
    if inner is None:
        return TangentMomentum(manifold=manifold, beta=0.9 if beta is None else beta)
    if beta is not None:
        raise ValueError(f"inner takes the place of the momentum, so beta={beta} would do nothing; leave it out.")
    return inner


@dataclass(frozen=True, kw_only=True)
class OnManifold(Transform):
    """Keep matrices W = s Q with Q in a set: step Q along it and retract, and perhaps step the number s.

    The inner transform sees the part of the gradient that is tangent, and what it returns is made tangent again,
    as it is with Adam's scales or with moments of earlier points. The gradient of s is <G, Q> / |Q|^2, so that
    with sgd for both W goes to first order along the projection of its gradient on all s Q. Weight decay acts
    on s if that is trained; else it does nothing but lengthen steps by 1 / (1 - lr weight_decay), or in Cayley's
    case nothing at all.

    Args:
        manifold: the set, scaled by s.
        inner: of the steps of Q, in units of W; it may read ``param``, which is Q.
        scale: s at the beginning; None takes that of the matrix, |W| / |Q|.
        magnitude: of the steps of s, (k,); None keeps it.
    """

    manifold: Manifold
    inner: Transform
    scale: float | None = None
    magnitude: Transform | None = None
    exact: ClassVar[tuple[str, ...]] = ("scale", "start", "change")

    def __post_init__(self) -> None:
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be a finite number > 0, or None, got {self.scale}.")
        if self.inner.constrains:
            raise ValueError("the inner transform constrains parameters, too; leave its constraint out.")

    def init(self, param: Tensor, index: Tensor) -> State:
        """The inner state, s, and what is known between a step and its end."""
        norm = torch.linalg.matrix_norm(param)
        scale = (
            norm / self.manifold.size(param.shape) if self.scale is None else torch.full_like(norm, self.scale)
        )
        if not scale.is_meta and bool((scale == 0).any()):
            raise ValueError("a matrix is zero and has no scale of its own; give scale=..., or start elsewhere.")
        state: dict[str, State | Tensor] = {"inner": self.inner.init(param, index), "scale": scale}
        if self.manifold.needs_start:
            state["start"] = torch.zeros_like(param)
        if self.magnitude is not None:
            state["magnitude"] = self.magnitude.init(norm, index)
            state["change"] = torch.zeros_like(norm)
        return state

    @property
    def reads_param(self) -> bool:
        """Always."""
        return True

    @property
    def constrains(self) -> bool:
        """Always."""
        return True

    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """(k, m, n) -> (k, m, n), tangent."""
        point = param.to(grad.dtype) / state["scale"][:, None, None]
        if self.manifold.needs_start:
            state["start"].copy_(point)
        if self.magnitude is not None:
            along = (grad * point).sum((-2, -1)) / self.manifold.size(grad.shape) ** 2
            shape = torch.empty_like(along, device="meta")
            state["change"].copy_(self.magnitude.update(along, state["magnitude"], shape))
        step = self.inner.update(self.manifold.tangent(grad, point), state["inner"], point)
        return self.manifold.tangent(step, point)

    def constrain(self, param: Tensor, state: State, lr: float, weight_decay: float) -> Tensor:
        """Bring (k, m, n) back to s Q, with the new s."""
        scale = state["scale"]
        point = self.manifold.retract(param / scale[:, None, None], state.get("start"))
        if self.magnitude is not None:
            new = scale * (1 - lr * weight_decay) - lr * state["change"]
            scale.copy_(torch.where(new == 0, scale, new))  # from zero there would be no way back
        return scale[:, None, None] * point
