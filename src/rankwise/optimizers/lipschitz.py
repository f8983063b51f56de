"""Steps of a known norm, and weights that stay below one."""

from ..core.combining import by_shape, chain
from ..core.transforms import Transform
from ..linalg import POLAR_EXPRESS, odd_range
from .adam import adam
from .muon import Orthogonalize
from .sgd import Momentum
from .soft_cap import SoftCap

MARGIN = 1e-3  # rounding of products in float32, and more


def lipschitz(
    *,
    limit: float = 1.0,
    constraint: Transform | None = None,
    beta: float = 0.95,
    nesterov: bool = True,
    polynomials: tuple[tuple[float, float, float], ...] = POLAR_EXPRESS,
    other: Transform = adam(betas=(0.9, 0.95)),  # noqa: B008 (frozen)
) -> Transform:
    """Muon with steps of norm one from root mean square to root mean square, and weights whose norm has a limit.

    No step is longer than c, the largest value of ``polynomials`` on [0, 1], so that a soft cap for the limit
    plus lr c keeps weights below the limit for ever. :func:`rankwise.lipschitz_bound` tells what follows for a
    network. Tables of embeddings get ``chain(adam(), row_cap())`` in a group of their own.

    Weight decay alone is a constraint, too: with ``constraint=sgd()``, which does nothing, norms settle below
    c / weight_decay.

    >>> lipschitz(limit=2.0).matrix.parts[2].limit
    2.0

    Args:
        limit: of the norms of matrices, sqrt(n / m) times the largest singular value.
        constraint: another one, such as ``hard_cap(limit=...)``; then ``limit`` is not used.
        beta: of the mean of gradients.
        nesterov: look one step ahead.
        polynomials: of the Newton-Schulz iteration.
        other: for vectors and scalars.

    References: Newhouse et al., "Training transformers with enforced Lipschitz constants", 2025, arXiv
        2507.13338. Their bound of a step leaves the overshoot of the iteration out, or divides it by a scale
        twice; here it is exact but for rounding, for which there is a margin.
    """
    step = odd_range(polynomials, 1.0)[1] * (1 + MARGIN)
    cap = SoftCap(limit=limit, step=step) if constraint is None else constraint
    momentum = Momentum(beta=beta, nesterov=nesterov, average=True)
    return by_shape(matrix=chain(momentum, Orthogonalize(polynomials=polynomials, least=0.0), cap), other=other)
