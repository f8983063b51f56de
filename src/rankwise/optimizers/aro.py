"""Steps along the axes of a frame that turns with them."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.combining import by_shape, chain
from ..core.methods import check_count, check_finite
from ..core.seen import wide
from ..core.states import State, leaves
from ..core.transforms import Transform
from ..linalg import orthonormal, product
from .adam import adam
from .sgd import Momentum

SHIFT = 1e-6


@dataclass(frozen=True, kw_only=True)
class Balance(Transform):
    """Give all rows and all columns of (k, m, n) nearly the root mean square one, by turns (Sinkhorn's way).

    Args:
        passes: over rows and columns.
        columns: else only rows, and one pass is enough.

    References: Scetbon et al., "Gradient multi-normalization", 2025, arXiv 2502.06742.
    """

    passes: int = 5
    columns: bool = True

    def __post_init__(self) -> None:
        check_count("passes", self.passes)

    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """(k, m, n) -> (k, m, n)."""
        for _ in range(self.passes):
            for axis in (-1, -2) if self.columns else (-1,):
                size = grad.square().mean(axis, keepdim=True).sqrt()
                grad = torch.where(size > 0, grad / size, grad)
        return grad


@dataclass(frozen=True, kw_only=True)
class TurningFrame(Transform):
    """Step by base(R'M) in a frame R of the rows, which goes on to the Q of a QR of M base(R'M)'.

    What M does not determine of the new frame goes on from the old one, so that it is definite also where M has
    not full rank.

    Args:
        base: sees (k, m, n); it must have no state, as it looks twice.
        scale: of the step.
    """

    base: Transform
    scale: float = 1.0
    exact: ClassVar[tuple[str, ...]] = ("frame",)

    def __post_init__(self) -> None:
        check_finite("scale", self.scale)

    def init(self, param: Tensor, index: Tensor) -> State:
        """The axes."""
        if leaves(self.base.init(param, index)):
            raise ValueError(
                f"{type(self.base).__name__} has a state; the base of a turning frame must have none."
            )
        m = param.shape[-2]
        eye = torch.eye(m, dtype=param.dtype, device=param.device)
        return {"frame": eye.expand(len(param), m, m).contiguous()}

    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """(k, m, n) -> (k, m, n)."""
        frame, like = state["frame"], torch.empty_like(grad, device="meta")
        cross = grad @ self.base.update(product(frame.mT, grad), {}, like).mT
        size = torch.linalg.matrix_norm(cross, keepdim=True) + torch.finfo(cross.dtype).tiny
        frame.copy_(orthonormal(cross / size + SHIFT * frame))
        return product(frame, self.base.update(product(frame.mT, grad), {}, like)) * self.scale


def aro(
    *,
    beta: float = 0.95,
    base: Transform = Balance(),
    scale: float = 0.2,
    other: Transform = adam(),  # noqa: B008 (frozen)
) -> Transform:
    """ARO: momentum through a map of rows or entries, in a frame of the shorter side that adapts to this map.

    The steps do not depend on the axes of that side, as Muon's do not. With rows alone as the base,
    ``Balance(columns=False)``, and a momentum that stays, the frame reaches the singular vectors and the step is
    Muon's times a constant; with the identity as the base it is SGD with momentum in any frame.

    >>> aro().matrix.parts[1].inner.base
    Balance(passes=5, columns=True)

    Args:
        beta: of the mean of gradients.
        base: the map, without a state: ``Balance()`` for rows and columns, ``sign()``.
        scale: of the step, whose root mean square is then this: about Adam's, so that its lr serves.
        other: for vectors and scalars.

    References: Gong et al., 2026, arXiv 2602.09006, from a summary of the paper: no official code was found, and
    the defaults of beta, passes and scale are unverified, as is the side. There QR may be a shifted Cholesky-QR,
    Adam may be the base, and one frame may serve all layers of a residual stream; these are not here.
    """
    matrix = chain(Momentum(beta=beta, average=True), wide(TurningFrame(base=base, scale=scale)))
    return by_shape(matrix=matrix, other=other)
