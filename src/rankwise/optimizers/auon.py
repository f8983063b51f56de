"""Momentum divided by its norm, and by a number that is one."""

import math
from dataclasses import dataclass

from torch import Tensor

from ..core.combining import by_shape, chain
from ..core.methods import check_count
from ..core.states import State
from ..core.transforms import Transform
from ..linalg import MUON, newton_schulz
from .adam import adam
from .aspect import Aspect
from .gains import sizes
from .sgd import Momentum

FLOOR = 1e-7


@dataclass(frozen=True, kw_only=True)
class HyperbolicScale(Transform):
    """Divide (k, ...) by r = sqrt(mean(cosh(gamma x)^2)), where x is the step divided by its norm.

    As the squares of x sum to one, r is between 1 and sqrt(1 + sinh(gamma)^2 / N) for N entries: one.

    Args:
        gamma: how much large entries count.
        normalised: return x / r, else the step itself divided by r.
        polynomials: x is first changed by these steps of a Newton-Schulz iteration, and x / r is returned.
    """

    gamma: float = 1.0
    normalised: bool = True
    polynomials: tuple[tuple[float, float, float], ...] = ()

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise ValueError(f"gamma must be >= 0, got {self.gamma}.")

    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """(k, ...) -> (k, ...)."""
        unit = grad / (sizes(grad) + FLOOR)
        if self.polynomials:
            unit = newton_schulz(unit, self.polynomials)
        root = sizes((unit * self.gamma).cosh()) / math.sqrt(grad[0].numel())
        return (unit if self.normalised or self.polynomials else grad) / root


def auon(
    *,
    beta: float = 0.95,
    gamma: float = 1.0,
    released: bool = False,
    other: Transform = adam(betas=(0.8, 0.95)),  # noqa: B008 (frozen)
) -> Transform:
    """AuON: Nesterov momentum divided by its norm and by the root mean square of a cosh, which is one.

    So, to about 1 / N for N entries, it is SGD with Nesterov momentum divided by its Frobenius norm, times
    sqrt(max(1, m / n)): singular values keep their ratios, and nothing is orthogonalised. At Muon's lr steps are
    smaller than Muon's by the root of the rank. See :func:`hybrid_auon`.

    >>> [type(part).__name__ for part in auon().matrix.parts]
    ['Momentum', 'HyperbolicScale', 'Aspect']

    Args:
        beta: of the mean of gradients.
        gamma: of the cosh; the released code has 1.5.
        released: do what the released code does: the norm divides only inside of the cosh, and the shape does not
            count. This is SGD with Nesterov momentum, whose steps depend on the scale of the loss.
        other: for vectors and scalars.

    References: Maity, 2025, arXiv 2509.24320.
    """
    parts = (
        Momentum(beta=beta, nesterov=True, average=True),
        HyperbolicScale(gamma=gamma, normalised=not released),
    )
    return by_shape(matrix=chain(*parts, *(() if released else (Aspect(),))), other=other)


def hybrid_auon(
    *,
    beta: float = 0.95,
    gamma: float = 1.0,
    polynomials: tuple[tuple[float, float, float], ...] = (MUON,) * 5,
    other: Transform = adam(betas=(0.8, 0.95)),  # noqa: B008 (frozen)
) -> Transform:
    """Hybrid AuON: AuON with Newton-Schulz steps before the cosh; this is Muon but for its factor of the shape.

    The number that divides is about sqrt(1 + gamma^2 / max(m, n)).

    >>> from rankwise.optimizers import muon
    >>> hybrid_auon().matrix.parts[1].polynomials == muon().matrix.parts[1].polynomials
    True

    Args:
        beta: of the mean of gradients.
        gamma: of the cosh; the released code has 1.5.
        polynomials: of the Newton-Schulz iteration. The text of the paper has one, its code five.
        other: for vectors and scalars.

    References: Maity, 2025, arXiv 2509.24320. There the sides of kernels of convolutions are orthogonalised; here
    matrices (out, rest).
    """
    check_count("the number of polynomials", len(polynomials))
    scale = HyperbolicScale(gamma=gamma, polynomials=polynomials)
    return by_shape(matrix=chain(Momentum(beta=beta, nesterov=True, average=True), scale), other=other)
