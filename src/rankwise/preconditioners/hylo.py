"""The natural gradient from a few rows for each process: interpolated, sampled, or by turns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from ..core.capture import Rows
from ..core.conditioning import Conditioning
from ..core.preconditioner import Curvature, Damping, Preconditioner, Shared, Size, damping_at, every_step
from ..core.sampled_fisher import divided, root_of, row_length, shared_bytes, stored
from ..linalg import (
    KhatriRao,
    Sharing,
    draw_important,
    from_triangles,
    importance_scales,
    pivoted_cholesky,
    reduced,
    to_triangle,
)

WATCHED = ("accumulated", "count", "norm", "critical")  # what is known about the course of the training


@dataclass(frozen=True, kw_only=True)
class HyLo(Preconditioner):
    """Let each process tell the others about few of its samples: what is inverted is as large as they are many.

    With the gradients of n samples of a process as the columns of U and the kernel K = U'U, of which the entries
    need no U, the Fisher matrix U U'/N becomes U_s S U_s'/N, a sum over r rows for each process:

    - ``"kid"``, Khatri-Rao interpolative decomposition: U is nearly U_s P for the rows that a pivoted Cholesky of
      K chooses, and what is left, E = K - P' K_ss P, is kept as damping within:
      S = P (I + E / (N a))^-1 P'. On one process nothing else is approximated, and the multiplication is off by
      at most (e + sqrt e) / a in the spectral norm, where e = min(1, |E| / (N a)).

    - ``"kis"``, kernel importance sampling: rows drawn with chances proportional to their |u_k|^2, without
      replacement, and S = n/r: biased towards the large ones, but cheap.

    - ``"exact"``: all rows; what :class:`Sngd` does.

    - ``"auto"``: a layer takes kid while its gradients change quickly, else kis. Their sums D over one
      window after the other are compared: kid if ``| |D| - |D_before| | >= threshold |D_before|``. The form of
      this test and the threshold are unverified; the released code has schedules fixed by hand instead.

    In all of them S is symmetric and positive definite, so that the multiplication is, too, with eigenvalues in
    (0, 1/a]. Few rows are of use only if a is not far below the next eigenvalue of K/N: see :meth:`neglected`.

    Args:
        rank: rows to keep for each process: a whole number, or a share of its samples, rounded down, at least 1.
        damping: a > 0, as for :class:`Sngd`; local rows are mixed with that of the step which looks at them.
        every: steps between two looks at the samples; in between the old rows are used.
        mode: see above.
        sharing: of samples with several positions. ``rankwise.linalg.reduced`` makes one outer product of them,
            as the method wants, which for trained convolutions may change more than few rows do; ``exact`` costs
            more; ``averaged`` is what the released code does to convolutions, a matrix T^2 times too small for T
            positions.
        reweight: let kis draw with replacement and scale rows so that the Fisher matrix is unbiased: better where
            damping is large, much worse where it is far below the largest eigenvalue.
        kept_only: let kid divide kept rows by their number instead of N, and the residual by nothing, as the
            released optimiser does, for which the published dampings were tuned: the curvature of what is kept
            becomes 1 / rank times too large.
        window: steps of a window of ``"auto"``; an epoch in the paper.
        threshold: see ``"auto"``.

    References: Mu, Soori, Can, Gürbüzbalaban and Mehri Dehnavi, "HyLo: a hybrid low-rank natural gradient descent
        method", 2022 (SC'22). The paper's text was not at hand: what is here follows its released code, with the
        rows chosen by pivoted Cholesky instead of a QR of sorted ones, which fails on copies, one N for all
        divisions, and the residual as the Schur complement, which is symmetric.
    """

    forming: ClassVar = ()
    decisions: ClassVar = frozenset({"critical"})
    rank: int | float = 0.1
    damping: Damping = 0.1
    every: int = 10
    mode: str = "auto"
    sharing: Sharing = reduced
    reweight: bool = False
    kept_only: bool = False
    window: int = 100
    threshold: float = 0.5

    def __post_init__(self) -> None:
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool) and self.rank >= 1
        if not whole and not (isinstance(self.rank, float) and 0 < self.rank <= 1):
            raise ValueError(f"rank must be a whole number >= 1 or a share > 0 and <= 1.0, got {self.rank!r}.")
        damping_at(self.damping, 0)
        every_step(self.every)
        every_step(self.window, "window")
        if self.mode not in ("auto", "kid", "kis", "exact"):
            raise ValueError(f'mode must be "auto", "kid", "kis" or "exact", got {self.mode!r}.')
        if not self.threshold > 0:
            raise ValueError(f"threshold must be > 0, got {self.threshold}.")

    def captures(self, step: int) -> bool:
        """At the first of every few steps."""
        return step % self.every == 0

    @property
    def reduces(self) -> bool:
        """Where samples are shared so."""
        return self.sharing is reduced

    def local(
        self, rows: Sequence[Rows], curvature: Curvature, generator: Generator, samples: int, damping: float
    ) -> Shared:
        """The rows that are kept, and how kid mixes them."""
        (each,) = (self.sharing(layer.each) for layer in rows)
        mode = self.mode
        if mode == "auto":
            mode = "kid" if bool(curvature.get("critical", True)) else "kis"
        if mode == "kid":
            return self._interpolated(each, samples, damping)
        return _shared(self._sampled(each, generator) if mode == "kis" else each)

    def update(self, shared: Shared, samples: int, curvature: Curvature) -> None:
        """Keep the rows of all."""
        for name in ("mix", "left"):
            curvature.pop(name, None)
        curvature |= {name: rows for name, rows in shared.rows.items() if name not in ("counts", "mix")}
        curvature |= shared.sums
        curvature["samples"] = torch.tensor(samples)
        if "mix" in shared.rows:
            curvature["mix"] = from_triangles(shared.rows["mix"], shared.rows["counts"].tolist())

    def invert(self, curvature: Curvature, damping: float, shapes: Sequence[tuple[int, int]]) -> Curvature:
        """The Cholesky factor of the kernel of the kept rows of all processes, damped."""
        return root_of(curvature, damping, shapes)

    def observe(self, gradients: Sequence[Tensor], curvature: Curvature, damping: float) -> None:
        """Add the gradients up, and compare the sums of two windows."""
        if self.mode != "auto":
            return
        (gradient,) = gradients
        sum_ = curvature["accumulated"] + gradient if "accumulated" in curvature else gradient.clone()
        count = int(curvature.get("count", 0)) + 1
        if count >= self.window:  # more where a state is of a longer one
            norm = torch.linalg.vector_norm(sum_).cpu()
            if "norm" in curvature:
                before = curvature["norm"]
                curvature["critical"] = ((norm - before).abs() >= self.threshold * before).long()
            curvature["norm"] = norm
            sum_, count = torch.zeros_like(sum_), 0
        curvature |= {"accumulated": sum_, "count": torch.tensor(count)}

    def apply(self, gradients: Sequence[Tensor], curvature: Curvature, damping: float) -> list[Tensor]:
        """(U_s S U_s' / N + a I)^-1 V, with the damping of the last look at the samples."""
        return divided(gradients, curvature)

    def state_bytes(self, sizes: Sequence[Size]) -> int:
        """The rows that one process keeps, and the root of their kernel; with kid their mix, too."""
        (size,) = sizes
        rows, each = shared_bytes(size, self.sharing)
        kept = rows if self.mode == "exact" else self._count(rows)
        squares = 2 if self.mode in ("auto", "kid") else 1
        summed = size.shape[0] * size.shape[1] if self.mode == "auto" else 0
        return kept * each + (squares * kept**2 + summed) * size.dtype.itemsize

    def cost(self, shapes: Sequence[tuple[int, int]]) -> float:
        """Kernels of equal size, from rows as long as (m, n) say."""
        return row_length(shapes)

    def neglected(self, handle: Conditioning) -> dict[str, dict[str, float]]:
        """Say how much the last interpolation left out, by layers; those that were sampled are not there.

        ``share`` is that of the trace of the kernels. ``over_damping`` is |E| / (N a) in the Frobenius norm: at
        least the next eigenvalue of each kernel divided by N a, and at least the e of the bound above. Far above
        one no low rank is of use with this damping: take more rows, or damp more.
        """
        found = {}
        for block, curvature in handle.curvature.items():
            if "left" in curvature:
                trace, left, squares = curvature["left"].tolist()
                scale = float(curvature["samples"]) * float(curvature["damping"])
                found[block] = {"share": left / trace if trace else 0.0, "over_damping": squares**0.5 / scale}
        return found

    def restart(self, handle: Conditioning) -> None:
        """Let ``"auto"`` begin anew with kid, such as right after the learning rate fell."""
        for curvature in handle.curvature.values():
            for name in WATCHED:
                curvature.pop(name, None)

    def _count(self, rows: int) -> int:
        """How many of a process's rows are kept."""
        return min(rows, self.rank if isinstance(self.rank, int) else max(1, int(rows * self.rank + 1e-9)))

    def _interpolated(self, each: KhatriRao, samples: int, damping: float) -> Shared:
        """Rows for kid, and the L of S = L L'."""
        kernel, count = each.gram(), self._count(len(each))
        found = pivoted_cholesky(kernel, count)
        kept = each.take(found.rows)
        mix = found.damped(damping * (1 if self.kept_only else samples))
        if self.kept_only and count:
            kept = kept.scaled((len(each) / count) ** 0.5)
        left = torch.stack([kernel.trace(), found.residual.trace(), found.residual.square().sum()])
        return _shared(kept, mix, {"left": left})

    def _sampled(self, each: KhatriRao, generator: Generator) -> KhatriRao:
        """Rows for kis, scaled so that the sum of their outer products stands for that of all."""
        squares = each.squared_norms()
        alive, count = squares.nonzero()[:, 0], self._count(len(each))
        if len(alive) <= count:
            return each.take(alive)
        rows = draw_important(squares, count, generator, replacement=self.reweight)
        kept = each.take(rows)
        return kept.scaled(importance_scales(squares, rows) if self.reweight else (len(each) / count) ** 0.5)


def _shared(kept: KhatriRao, mix: Tensor | None = None, sums: Curvature | None = None) -> Shared:
    """What is exchanged: rows, and the lower triangle of their mix L."""
    rows = stored([kept])
    if mix is not None:
        rows |= {"mix": to_triangle(mix), "counts": torch.tensor([len(kept)], device=mix.device)}
    return Shared(sums or {}, rows)
