"""Singular vectors that train by turns (SST)."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..core.methods import Course, Schedule
from ..core.processes import of_first
from ..matrices import Dense, Diagonal, Product, Spectral, StructuredMatrix


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """The fields of :class:`SampledVectors`, which the adapter has, too."""

    hold: int = 200
    warmup: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("hold", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)!r}.")


@dataclass(frozen=True, kw_only=True)
class SampledVectors(SamplingSettings, Schedule):
    """Every ``hold`` steps draw the pairs of vectors that train now, and forget the optimiser's moments of them.

    Of k pairs the first is drawn with probability (1 / k + s_i / sum s) / 2, the others likewise from the rest.
    After a step vectors have length one again and values are at least zero. When about as many were drawn as
    there are, the product is decomposed anew, so that vectors are orthonormal again, in the first of several
    processes for all; then moments of the values are forgotten, too. After each draw the first steps of the
    vectors count less. Matrices of which nothing trains stay as they are.

    Args:
        hold: steps between two draws.
        warmup: so many steps of the vectors after a draw are shortened, the first most.
        seed: of the draws.

    References: Zhao et al., "Sparse spectral training", ICML 2025, arXiv 2405.15481. No published code was at
        hand; that moments are reset and vectors normalised is from a summary of the paper, and ``hold`` and the
        form of ``warmup`` are not verified.
    """

    def check(self, matrix: StructuredMatrix) -> None:
        """Raise unless it is a Spectral."""
        if not isinstance(matrix, Spectral):
            raise ValueError(f"SampledVectors acts on a Spectral, got {type(matrix).__name__}.")

    @staticmethod
    def draw(values: Tensor, count: int, generator: Generator) -> Tensor:
        """Draw different numbers of 0 ... k - 1 for values (k,), in order."""
        values = values.detach().double().cpu().clamp_min(0)
        share = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
        return torch.multinomial(share + 1 / len(values), count, generator=generator).sort().values

    def before(self, course: Course) -> None:
        """Remember the vectors where their step will be shortened."""
        for name, matrix in _matrices(course).items():
            if course.done % self.hold < self.warmup:
                state = course.state.setdefault(name, {})
                state["left"], state["right"] = (
                    vectors.detach().clone() for vectors in (matrix.left_chosen, matrix.right_chosen)
                )

    @torch.no_grad()
    def after(self, course: Course) -> None:
        """Shorten steps, and put vectors and values back where they belong."""
        share = ((course.done - 1) % self.hold + 1) / (self.warmup + 1)
        for name, matrix in _matrices(course).items():
            for key, vectors, axis in (("left", matrix.left_chosen, 0), ("right", matrix.right_chosen, 1)):
                old = course.state.get(name, {}).pop(key, None)
                if old is not None:
                    vectors.copy_(torch.lerp(old, vectors, share))
                vectors /= vectors.norm(dim=axis, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)
            matrix.values.clamp_(min=0)

    @torch.no_grad()
    def settle(self, course: Course) -> None:
        """Draw, and at the end of a round decompose first."""
        if course.done == 0 or course.done % self.hold:
            return  # the first pairs were drawn when the matrix was made
        for i, (name, matrix) in enumerate(_matrices(course).items()):
            state = course.state.setdefault(name, {})
            if "drawn" in state and int(state["drawn"]) == course.done:
                continue  # a state was loaded
            state["drawn"] = torch.tensor(course.done)
            left, right = matrix.vectors()
            forgotten = [matrix.left_chosen, matrix.right_chosen]
            turns = -(-matrix.rank // len(matrix.chosen))
            if course.done // self.hold % turns == 0:
                left, values, right = of_first(*_decomposed(left, matrix.values.detach(), right))
                matrix.values.copy_(values)
                forgotten.append(matrix.values)
            generator = Generator().manual_seed(self.seed + 7919 * course.done + i)
            matrix.put(left, right, self.draw(matrix.values, len(matrix.chosen), generator))
            for parameter in forgotten:
                course.optimizer.state.pop(parameter, None)

    def finished(self, matrix: StructuredMatrix) -> StructuredMatrix:
        """An ordinary product of three factors, all trained."""
        assert isinstance(matrix, Spectral)
        left, right = matrix.vectors()
        return Product(Dense(left), Diagonal(matrix.values.detach()), Dense(right))


def _matrices(course: Course) -> dict[str, Spectral]:
    found = {name: matrix for name, matrix in course.matrices.items() if isinstance(matrix, Spectral)}
    return {name: each for name, each in found.items() if any(p.requires_grad for p in each.parameters())}


def _decomposed(left: Tensor, values: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of a product, in float64, without writing it out."""
    (q, r), (p, t) = (torch.linalg.qr(each.double()) for each in (left, right.mT))
    u, s, vt = torch.linalg.svd(r * values.double() @ t.mT)
    return (q @ u).to(left.dtype), s.to(left.dtype), (vt @ p.mT).to(left.dtype)
