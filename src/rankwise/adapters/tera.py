"""A frozen random tensor network in which a few vectors are trained (TeRA)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator

from ..core.methods import Adapter
from ..core.statistics import Stats
from ..matrices import Base, Branch, Diagonal, Kronecker, Product, Seeded, StructuredMatrix, Sum


@dataclass(frozen=True, kw_only=True)
class Tera(Adapter):
    """Train vectors d_a in W + s (F_1 D_1 x ... x F_p D_p) G (D_p+1 F_p+1 x ... x D_N F_N) with W frozen.

    Here x is the Kronecker product and D_a = diag(d_a). This is a reconstruction: the published abstract says
    that a Tucker-like network of frozen random factors, shared by layers, is scaled by trained vectors of each
    layer; its code was not to be had, and all details here are ours.

    Outputs m = I_1 ... I_p and inputs n = I_p+1 ... I_N are split into modes as equal as their prime factors
    allow. F_a (I_a, R_a) and the core G are random and never stored, since G is as large as W where R_a = I_a:
    layers of one shape share them in memory, and a file holds their seeds and checksums
    (:class:`~rankwise.matrices.Seeded`).

    Exactly one vector starts at zero and all others at one: the change is zero and its gradient is not. With two
    at zero every gradient would be zero for ever, so that cannot be asked for. s makes the entries of the change
    have variance ``scale``^2 / n where all vectors are one.

    R_a = I_a allows full rank; but full rank is not full freedom: a layer has sum(R_a) - (N - 1) degrees of
    freedom, and fits a change of another family no better than these allow. The gradient of a vector grows with
    the product of the others' sizes: too large a learning rate explodes (1e-3 to 1e-2 is
    plausible, not measured). Decay nothing. A step costs about
    as much as another layer of W's size, until it is folded.

    Args:
        modes: into how many each side is split; fewer train more. 2 makes N = 4, the least tensor-like of the
            orders 4 to 6 that are plausible (unverified).
        core: the largest R_a; None means I_a.
        scale: see above.
        seed: of all frozen numbers.

    Learning rate: 1e-3, the lower end of 1e-3 to 1e-2, a guess of ours; the published rates are not known to
    us.

    References: Gu, Zhou, Iacovides, Mandic, "TeRA: Vector-based random tensor network for high-rank adaptation of
        large language models", 2025, arXiv 2509.03234.

    >>> from rankwise.matrices import Dense
    >>> adapted = Tera().attach(Base(Dense(torch.eye(64))), {}, Generator())
    >>> sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    32
    """

    lr: ClassVar[float | None] = 1e-3
    modes: int = 2
    core: int | None = None
    scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("modes", "core", "seed"):
            value, least = getattr(self, name), 0 if name == "seed" else 1
            if value is None and name == "core":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}.")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be a positive number, got {self.scale!r}.")

    def attach(self, base: Base, stats: Stats, generator: Generator) -> StructuredMatrix:
        """Return W + s (F_1 D_1 x ...) G (D_p+1 F_p+1 x ...)."""
        (m, n), device = base.shape, base.device
        wide = torch.promote_types(base.dtype, torch.float32)
        outputs, inputs = balanced_factors(m, self.modes), balanced_factors(n, self.modes)
        kept = [min(size, self.core or size) for size in (*outputs, *inputs)]
        vectors = [Diagonal(torch.ones(r, device=device, dtype=wide)) for r in kept]
        torch.nn.init.zeros_(vectors[0].values)
        left, right = [], []
        for a, (size, r, vector) in enumerate(zip((*outputs, *inputs), kept, vectors, strict=True)):
            if a < len(outputs):
                left.append(Product(Seeded(size, r, self.seed + a, device), vector))
            else:
                right.append(Product(vector, Seeded(r, size, self.seed + a, device)))
        rows, columns = math.prod(kept[: len(outputs)]), math.prod(kept[len(outputs) :])
        core = Seeded(rows, columns, self.seed + len(kept), device)
        scale = self.scale / math.sqrt(n * rows * columns)
        return Sum(base, Branch(Product(Kronecker(*left), core, Kronecker(*right)), scale))


def balanced_factors(size: int, count: int) -> list[int]:
    """Return at most ``count`` integers whose product is ``size``, about equal, largest first, none of them 1.

    Prime factors, the largest first, are each given to the smallest product so far. Of 1 it is [1].

    >>> balanced_factors(4096, 3), balanced_factors(11008, 3), balanced_factors(7, 3)
    ([16, 16, 16], [43, 16, 16], [7])
    """
    primes, left, divisor = [], size, 2
    while divisor * divisor <= left:
        while left % divisor == 0:
            primes.append(divisor)
            left //= divisor
        divisor += 1
    if left > 1:
        primes.append(left)
    groups = [1] * count
    for prime in reversed(primes):
        groups[groups.index(min(groups))] *= prime
    return sorted((group for group in groups if group > 1), reverse=True) or [1]
