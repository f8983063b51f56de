"""The metric tr(S D C D') of a weight's change D, written in the numbers that structured matrices store."""

import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..linalg import Metric, unpack
from ..matrices import (
    Dense,
    Diagonal,
    LowRank,
    PivotedLowRank,
    Product,
    Quantized,
    Scaled,
    Sparse,
    StructuredMatrix,
    Sum,
)


@dataclass(frozen=True)
class Side:
    """A positive definite second moment and its inverse, both (n, n)."""

    moment: Tensor
    inverse: Tensor

    def to(self, like: Tensor) -> "Side":
        """Take the type and place of a tensor."""
        return Side(self.moment.to(like), self.inverse.to(like))


def side_of(moment: Tensor, damping: float) -> Side:
    """Add a multiple of its mean diagonal to a second moment, and invert it in float64.

    Raises:
        ValueError: if it is zero.
    """
    metric = Metric(moment, damping)
    damped, root = metric.damped, metric.root
    assert damped is not None
    assert root is not None
    return Side(damped, torch.cholesky_inverse(root))


class Block(abc.ABC):
    """Some stored numbers, the coordinates that they are trained in, and the metric of their changes."""

    parameters: tuple[nn.Parameter, ...]

    def gradients(self) -> list[Tensor]:
        """Return the gradient in each coordinate, from those by the numbers."""
        return [p.grad for p in self.parameters if p.grad is not None]

    @abc.abstractmethod
    def solve(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the X with the largest <gradient, X> - 1/2 |X|^2: the metric's inverse times the gradient."""

    def move(self, change: Sequence[Tensor], step: float) -> Sequence[Tensor | None]:
        """Add a multiple of a change.

        Returns:
            for each coordinate None, or what earlier gradients must be multiplied by to fit the new place: from
            the right for the first coordinate, from the left for the second.
        """
        for parameter, each in zip(self.parameters, change, strict=True):
            parameter.add_(each, alpha=step)
        return [None] * len(self.parameters)


class BiasBlock(Block):
    """A bias: its metric is S."""

    def __init__(self, bias: nn.Parameter, outputs: Side) -> None:
        self.parameters, self.outputs = (bias,), outputs.to(bias)

    def solve(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return S^-1 g."""
        return [self.outputs.inverse @ gradients[0]]


class ScaledBlock(Block):
    """Numbers whose metric is not known: they go by mean gradient over root mean square, as in Adam.

    Args:
        parameter: of any shape.
        rate: how far a number goes whose gradient is always the same.
    """

    def __init__(self, parameter: nn.Parameter, rate: float) -> None:
        self.parameters, self.rate = (parameter,), rate

    def gradients(self) -> list[Tensor]:
        """Return the gradient and its square, both to be averaged."""
        return [part for g in super().gradients() for part in (g, g.square())]

    def solve(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """Divide the mean by the root of the mean square; the square has no change."""
        mean, square = gradients
        return [
            self.rate * mean / square.sqrt().clamp_min(torch.finfo(mean.dtype).tiny),
            torch.zeros_like(square),
        ]

    def move(self, change: Sequence[Tensor], step: float) -> Sequence[None]:
        """Add a multiple of the change."""
        self.parameters[0].add_(change[0], alpha=step)
        return [None, None]


class DenseBlock(Block):
    """All entries: the metric is the Kronecker product of S and C."""

    def __init__(self, matrix: Dense, outputs: Side, inputs: Side) -> None:
        self.parameters = (matrix.weight,)
        self.outputs, self.inputs = outputs.to(matrix.weight), inputs.to(matrix.weight)

    def solve(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return S^-1 G C^-1."""
        return [self.outputs.inverse @ gradients[0] @ self.inputs.inverse]


class LowRankBlock(Block):
    """Two factors: see :func:`tangent_step`."""

    def __init__(self, matrix: LowRank, outputs: Side, inputs: Side) -> None:
        self.parameters = matrix.left, matrix.right
        self.outputs, self.inputs = outputs.to(matrix.left), inputs.to(matrix.left)

    def solve(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the changes of the left and of the right factor."""
        left, right = self.parameters
        return tangent_step(left, right, gradients[0], gradients[1], self.outputs, self.inputs)


class PivotedBlock(Block):
    """Kept lines K and the mix M that makes the others: lines = [K; M K] in some order.

    They are trained as the factors A = [I; M] and B = K, whose gradients follow from those by K and M, and whose
    changes X B + A Y are the same first-order changes of the matrix. After a step the lines are
    (A + X) (B + Y) = (A + X) R^-1 R (B + Y), where R = I + X_1 and X_1 belongs to the kept lines, which is
    [I; M] K again. Adding to K and M instead may diverge where kept lines come close to each other.
    """

    def __init__(self, matrix: PivotedLowRank, outputs: Side, inputs: Side) -> None:
        self.parameters = matrix.kept, matrix.mix
        lines, length = (outputs, inputs) if matrix.side == "rows" else (inputs, outputs)
        order = matrix.order.long().to(lines.moment.device)
        ordered = Side(lines.moment[order][:, order], lines.inverse[order][:, order])
        self.lines, self.length = ordered.to(matrix.kept), length.to(matrix.kept)

    def gradients(self) -> list[Tensor]:
        """Return those by A and B."""
        kept, mix = self.parameters
        found = super().gradients()
        if not found:
            return []
        by_kept, by_mix = found
        return [torch.cat([by_kept @ kept.mT - mix.mT @ by_mix, by_mix]), by_kept]

    def solve(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return X and Y."""
        kept, mix = self.parameters
        left = torch.cat([torch.eye(len(kept)).to(kept), mix])
        return tangent_step(left, kept, gradients[0], gradients[1], self.lines, self.length)

    def move(self, change: Sequence[Tensor], step: float) -> Sequence[Tensor]:
        """Step, and turn earlier gradients by R' from the right and R'^-1 from the left."""
        kept, mix = self.parameters
        x, y = change
        first, others = x.split([len(kept), len(mix)])
        turned = torch.eye(len(kept)).to(kept) + step * first
        back = torch.linalg.inv(turned)
        kept.copy_(turned @ (kept + step * y))
        mix.copy_((mix + step * others) @ back)
        return [turned.mT, back.mT]


def tangent_step(
    left: Tensor, right: Tensor, by_left: Tensor, by_right: Tensor, outputs: Side, inputs: Side
) -> tuple[Tensor, Tensor]:
    """Find the first-order change of ``left @ right`` with the largest <G, D> - 1/2 tr(S D C D').

    With A = left, B = right and D = X B + A Y this is the projection of S^-1 G C^-1 on the changes that keep the
    rank, orthogonal in the metric: X = S^-1 (G B') (B C B')^-1, which takes all in the row space of B, and
    Y = (A' S A)^-1 (A' G) (C^-1 - B' (B C B')^-1 B), which takes the rest.

    Args:
        left: A, (m, r), of full rank.
        right: B, (r, n), of full rank.
        by_left: G B', (m, r).
        by_right: A' G, (r, n).
        outputs: S.
        inputs: C.

    Returns:
        X (m, r) and Y (r, n).
    """
    inner, outer = _root(right @ inputs.moment @ right.mT), _root(left.mT @ outputs.moment @ left)
    x = torch.cholesky_solve((outputs.inverse @ by_left).mT, inner).mT
    taken = torch.cholesky_solve(right @ by_right.mT, inner).mT @ right
    return x, torch.cholesky_solve(by_right @ inputs.inverse - taken, outer)


class DiagonalBlock(Block):
    """Numbers that are taken each for itself, with the diagonal of their metric."""

    def __init__(self, parameters: tuple[nn.Parameter, ...], diagonals: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.diagonals = [d.clamp_min(torch.finfo(d.dtype).tiny) for d in diagonals]

    def solve(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """Divide by the diagonals."""
        return [g / d.to(g) for g, d in zip(gradients, self.diagonals, strict=True)]

    @classmethod
    def of_sparse(cls, matrix: Sparse, outputs: Side, inputs: Side) -> "DiagonalBlock":
        """Entry (i, j) has S_ii C_jj."""
        both = torch.outer(outputs.moment.diagonal(), inputs.moment.diagonal())
        return cls((matrix.values,), [both.to(matrix.values.device)[matrix.mask()]])

    @classmethod
    def of_quantized(cls, matrix: Quantized, outputs: Side, inputs: Side) -> "DiagonalBlock":
        """Group g of row i has S_ii k' C_gg k for the scale of its codes k, and S_ii 1' C_gg 1 for the offset."""
        (m, n), group = matrix.shape, matrix.group
        padded = (0, -n % group)
        codes = functional.pad(unpack(matrix.packed, matrix.bits)[:, :n].to(inputs.moment), padded)
        codes = codes.view(m, -1, group)
        moment = functional.pad(inputs.moment, (*padded, *padded)).view(codes.shape[1], group, -1, group)
        moments = moment.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (groups, group, group)
        rows = outputs.moment.diagonal()[:, None]
        scale = torch.einsum("igk,gkl,igl->ig", codes, moments, codes)
        return cls((matrix.scale, matrix.offset), [rows * scale, rows * moments.sum((1, 2))])


class MatrixDiagonalBlock(Block):
    """The entries of a diagonal matrix: their metric is the entrywise product of S and C."""

    def __init__(self, matrix: Diagonal, outputs: Side, inputs: Side) -> None:
        self.parameters = (matrix.values,)
        self.root = torch.linalg.cholesky(outputs.moment * inputs.moment).to(matrix.values)

    def solve(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return (S * C)^-1 g."""
        return [torch.cholesky_solve(gradients[0][:, None], self.root)[:, 0]]


KINDS: dict[type[StructuredMatrix], Callable[[Any, Side, Side], Block]] = {
    Dense: DenseBlock,
    Diagonal: MatrixDiagonalBlock,
    LowRank: LowRankBlock,
    PivotedLowRank: PivotedBlock,
    Quantized: DiagonalBlock.of_quantized,
    Sparse: DiagonalBlock.of_sparse,
}


def blocks_of(matrix: StructuredMatrix, outputs: Side, inputs: Side) -> Iterator[Block]:
    """Yield the blocks of a matrix and of all its parts.

    The parts of a product see the metrics through the other parts, as these are now.

    Raises:
        ValueError: if the metric of a kind of matrix is not known.
    """
    if isinstance(matrix, Sum):
        for part in matrix.parts:
            yield from blocks_of(part, outputs, inputs)
    elif isinstance(matrix, Scaled):
        yield from blocks_of(matrix.matrix, _scaled(outputs, matrix.scale**2), inputs)
    elif isinstance(matrix, Product):
        dense = [part.dense().detach().double() for part in matrix.parts]
        for i, part in enumerate(matrix.parts):
            left, right = dense[:i], dense[i + 1 :]
            through = _through(outputs, reduce(torch.matmul, left)) if left else outputs
            yield from blocks_of(
                part, through, _through(inputs, reduce(torch.matmul, right).mT) if right else inputs
            )
    elif any(True for _ in matrix.parameters()):
        if type(matrix) not in KINDS:
            raise ValueError(f"the metric of {type(matrix).__name__} is not known; heal with Adam instead.")
        yield KINDS[type(matrix)](matrix, outputs, inputs)


FLOOR = 1e-9  # of the mean diagonal, added where a metric is seen through a matrix that may be singular


def _through(side: Side, matrix: Tensor) -> Side:
    """The metric of x where that of ``matrix @ x`` is known."""
    return side_of(matrix.mT @ side.moment.to(matrix) @ matrix, FLOOR)


def _scaled(side: Side, factor: float) -> Side:
    return Side(side.moment * factor, side.inverse / factor)


def _root(gram: Tensor) -> Tensor:
    """The Cholesky root of a Gram matrix that may be singular but for what its type cannot resolve."""
    lift = torch.finfo(gram.dtype).eps ** 0.5 * gram.diagonal().mean()
    return torch.linalg.cholesky(gram.double() + lift * torch.eye(len(gram)).to(gram.device)).to(gram)
