"""A sparse update that a kernel makes of two small matrices (SNELL, SNELLA)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from ..core.methods import Ranked
from ..core.statistics import Stats
from ..linalg import distance, magnitude, soft
from ..matrices import Base, Branch, Frozen, Kernelled, Recomputed, Scaled, Scheduled, StructuredMatrix, Sum
from ..matrices.kernelled import Kernel, Shrink
from ..schedules import DensityBudget
from ..schedules.density_budget import DensitySettings


@dataclass(frozen=True, kw_only=True)
class Snella(Ranked, DensitySettings):
    """Train points p and q in W + s D, where D keeps the largest entries of a kernel matrix K, with W frozen.

    K_ij = c (k(p_1i, q_1j) - k(p_2i, q_2j)), with two heads. Its entries compete anew in each step, so which of
    W's are changed is learned. The points take as many numbers as LoRA's factors of this rank, but D may have
    full rank. D is made again for the gradient: a step keeps nothing of W's size, but takes as long as a dense
    product and about ``rank`` more for the kernel. The points are float32 where W is in half precision, and K is
    so under autocast too.

    The start is exact: p_2 = p_1 and q_2 = q_1, so the two heads cancel, all entries are equally large, and the
    first gradient reaches all of them. From then on entries compete by how far they have moved, where in the
    published code the random start decides at first, and W + D is not W. ``magnitude`` has no gradient where K is
    zero: with it the heads differ, and the first D is subtracted as a frozen term, whose kernel costs as much
    again, and which makes the change up to twice as dense. The mixture's share a starts at 0 if the heads
    cancel, else at 1, as published.

    The published code multiplies the entries that it leaves by their own absolute values (here ``magnitude``);
    finds the threshold by torch.quantile, which refuses more than 2^24 entries; and saves no density. Here the
    threshold is selected; the density of a layer stands in its spec, and is changed by setting ``density`` of its
    :class:`~rankwise.matrices.Kernelled`.

    With a ``target`` the layers compete, too: :class:`~rankwise.schedules.DensityBudget` gives those for which
    the loss is sensitive more entries, and all together fewer while they train: training needs
    :func:`rankwise.follow`. SNELLA goes from ``density=0.99`` to ``target=0.2``.

    Args:
        rank: numbers of a row or column over both heads, even.
        density: share of the entries that change, at first if there is a target. 0.1 is SNELL's.
        target: share of all layers' entries that change in the end; None leaves all layers at ``density``.
        kernel: ``distance`` or ``inner`` of :mod:`rankwise.linalg`; distances as published.
        shrink: how entries are left, of :mod:`rankwise.linalg`: ``soft``, as the paper says and without jumps;
            ``hard``; or ``magnitude``, as the code does.
        mixed: add a softmax of K over rows and a constant with trained sizes (SNELLA).
        scale: s.
        weight: c; 0.1 as published.
        dropout: share of the branch's inputs that are dropped while training.
        ranks: from :mod:`rankwise.rank_rules`; None gives all layers the same.
        warmup: it and all others are the fields of :class:`~rankwise.schedules.DensityBudget`.

    Learning rate: 1e-3, that of SNELL's experiments with AdamW.

    References: Shen et al., "Expanding sparse tuning for low memory usage" (SNELL), NeurIPS 2024,
        arXiv 2411.01800; "Kernelized sparse fine-tuning with bi-level parameter competition for vision models"
        (SNELLA), 2025, arXiv 2510.24037.

    >>> from rankwise.matrices import Dense
    >>> adapted = Snella(rank=4, mixed=False).attach(Base(Dense(torch.eye(8))), {}, Generator())
    >>> sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    64
    """

    step: ClassVar[int] = 2
    lr: ClassVar[float | None] = 1e-3

    rank: int = 32
    density: float = 0.1
    target: float | None = None
    kernel: Kernel = distance
    shrink: Shrink = soft
    mixed: bool = True
    scale: float = 1.0
    weight: float = 0.1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 2 or self.rank % 2:
            raise ValueError(f"rank must be even and >= 2 (there are two heads), got {self.rank!r}.")
        for name in ("scale", "weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)!r}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be >= 0 and < 1, got {self.dropout!r}.")
        _ = self._matrix(torch.ones(2, 1, 1), torch.ones(2, 1, 1), 0.0), self.schedule  # they check the others
        if self.target is not None and self.target > self.density:
            raise ValueError(
                f"target must be <= density {self.density}, at which layers begin, or None; got {self.target!r}."
            )

    @property
    def schedule(self) -> DensityBudget | None:
        """What spreads the entries over layers, if anything does."""
        return None if self.target is None else DensityBudget.of(self)

    def _matrix(self, outputs: Tensor, inputs: Tensor, share: float) -> Kernelled:
        return Kernelled(
            outputs,
            inputs,
            (self.weight, -self.weight),
            kernel=self.kernel,
            shrink=self.shrink,
            density=self.density,
            mixing=outputs.new_tensor([share, 1.0, 0.0]) if self.mixed else None,
        )

    def attach(self, base: Base, stats: Stats, generator: Generator) -> StructuredMatrix:
        """Return W + s D, or W + s (D - D at the start)."""
        wide = torch.promote_types(base.dtype, torch.float32)
        outputs, inputs = (self._points(size, generator).to(base.device, wide) for size in base.shape)
        if self.shrink is magnitude:
            moving, start = (self._matrix(outputs.clone(), inputs.clone(), 1.0) for _ in range(2))
            change = Sum(moving, Scaled(Frozen(start), -1.0))
        else:
            change = self._matrix(outputs[:1].repeat(2, 1, 1), inputs[:1].repeat(2, 1, 1), 0.0)
        trained, schedule = Recomputed(change), self.schedule
        if schedule is not None:
            trained = Scheduled(trained, schedule.data())
        return Sum(base, Branch(trained, self.scale, self.dropout))

    def _points(self, count: int, generator: Generator) -> Tensor:
        """(2, count, rank / 2), uniform as in the published code."""
        width = self.rank // 2
        return (2 * torch.rand(2, count, width, generator=generator) - 1) / math.sqrt(count * width)
