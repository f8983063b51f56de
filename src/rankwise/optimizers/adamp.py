"""Steps without the part that only lengthens weights whose length does not matter."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.states import State
from ..core.transforms import Transform
from .adam import adam
from .sgd import sgd


@dataclass(frozen=True, kw_only=True)
class Tangent(Transform):
    """Take from steps of weights of which only the direction matters the part along the weight.

    The length of a row w does not matter to the loss if its gradient is orthogonal to w. So where all cosines of
    rows are below ``delta`` / sqrt(their length), each row's step loses its part along w; else, where the cosine
    of the whole matrix is below ``delta`` / sqrt(m n), that of the matrix does. There decay is weaker too.

    Args:
        inner: makes steps.
        delta: of the test; 0 for never, ``inf`` for always by rows, where lengths are known not to matter.
        weight_decay: decoupled, of this transform instead of the optimiser's.
        ratio: of the decay where the part is taken.
        whole: test the whole matrix too.
        eps: added to the lengths of weights.
    """

    inner: Transform
    delta: float = 0.1
    weight_decay: float = 0.0
    ratio: float = 0.1
    whole: bool = True
    eps: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("delta", "weight_decay", "ratio", "eps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}.")

    @property
    def reads_param(self) -> bool:
        """Lengths and cosines."""
        return True

    def init(self, param: Tensor, index: Tensor) -> State:
        """The state of what makes steps."""
        return self.inner.init(param, index)

    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """(k, ...) -> (k, ...)."""
        weight = param.to(grad.dtype)
        step = self.inner.update(grad, state, param)
        decayed = weight
        if grad.ndim == 3:
            step, found = self._projected(step, grad, weight)
            decayed = weight * (1 - (1 - self.ratio) * found.to(weight.dtype))
        return step + self.weight_decay * decayed if self.weight_decay else step

    def _projected(self, step: Tensor, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return steps (k, m, n), and where a part was taken, (k, 1, 1)."""
        products = ((grad, weight), (grad, grad), (weight, weight), (step, weight))
        rows = torch.stack([(a * b).sum(-1, keepdim=True) for a, b in products])  # (4, k, m, 1)
        found, part = self._part(rows, grad.shape[-1])
        if self.whole:
            whole, other = self._part(rows.sum(-2, keepdim=True), grad.shape[-1] * grad.shape[-2])
            found, part = found | whole, torch.where(found, part, other)
        return step - weight * torch.where(found, part, 0.0), found

    def _part(self, products: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return whether all cosines are small (k, 1, 1), and the multiples of the weights in the steps."""
        cross, grads, weights, along = products
        cosine = cross.abs() / (grads.sqrt() * weights.sqrt() + torch.finfo(cross.dtype).tiny)
        small = cosine.amax(dim=-2, keepdim=True) < self.delta / size**0.5
        return small, along / (weights.sqrt() + self.eps).square()


def adamp(
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    delta: float = 0.1,
    weight_decay: float = 0.0,
    ratio: float = 0.1,
    whole: bool = True,
) -> Transform:
    """AdamP: Adam whose steps do not lengthen weights that are normalised afterwards.

    Whether they are is tested at each step, by the angle of gradient and weight. On weights whose length matters
    it is Adam where the test does not err: that of rows hardly does, but that of the whole matrix holds by chance
    as often as |z| < 0.1 for a normal z, at 8 % of the steps of any matrix, so ``whole=False`` is the better
    choice without layer norms.

    >>> adamp(delta=0.0).inner == adam()
    True

    Args:
        betas: of Adam.
        eps: of Adam.
        delta: of the test; 0 for never, ``inf`` for always by rows, where lengths are known not to matter.
        weight_decay: decoupled, in place of the optimiser's, which should be zero: this one is weaker where the
            test holds.
        ratio: of the decay where the test holds.
        whole: test the whole matrix too, as published.

    References: Heo et al., ICLR 2021, arXiv 2006.08217. Nesterov's form of Adam is not here.
    """
    inner = adam(betas=betas, eps=eps)
    return Tangent(inner=inner, delta=delta, weight_decay=weight_decay, ratio=ratio, whole=whole)


def sgdp(
    *,
    beta: float = 0.9,
    nesterov: bool = False,
    delta: float = 0.1,
    weight_decay: float = 0.0,
    ratio: float = 0.1,
    whole: bool = True,
) -> Transform:
    """SGDP: SGD with momentum whose steps do not lengthen weights that are normalised afterwards.

    On weights whose length matters it is SGD; see :func:`adamp`.

    >>> sgdp(delta=0.0).inner == sgd(beta=0.9)
    True

    Args:
        beta: how much of the running sum of gradients stays at each step.
        nesterov: look one step ahead.
        delta: of the test.
        weight_decay: decoupled; there it is divided by 1 - beta, so that 1e-5 there is 1e-4 here at 0.9.
        ratio: of the decay where the test holds.
        whole: test the whole matrix too, as published.

    References: Heo et al., ICLR 2021, arXiv 2006.08217. In the published code, without ``nesterov``, the part is
    taken from the running sum itself, which is what is stepped there; here, as in the paper, the sum stays.
    """
    inner = sgd(beta=beta, nesterov=nesterov)
    return Tangent(inner=inner, delta=delta, weight_decay=weight_decay, ratio=ratio, whole=whole)
