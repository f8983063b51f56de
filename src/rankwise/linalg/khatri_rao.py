"""The gradients of the samples of a layer as the columns of one tall matrix, which is never formed."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = 1 << 24  # numbers of a temporary matrix


@dataclasses.dataclass(frozen=True)
class KhatriRao:
    """U = [vec u_1, ..., vec u_R] with u_k = sum_t g_kt a_kt', an (m, n) matrix for each of R samples.

    With one position (T = 1) this is the Khatri-Rao product of gradients and inputs, and U'U the Hadamard product
    of their Gram matrices. Inputs that are numbers of tokens stand for rows with a one at that place.

    Args:
        inputs: (R, T, n); or (R, T) of whole numbers below ``width``.
        gradients: (R, T, m), each of its sample's own loss.
        width: n.

    >>> import torch
    >>> u = KhatriRao(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0]]]), 2)
    >>> u.gram(), u.combination(torch.ones(1)), u.products(torch.ones(1, 2))
    (tensor([[45.]]), tensor([[3., 6.]]), tensor([9.]))
    """

    inputs: Tensor
    gradients: Tensor
    width: int

    def __len__(self) -> int:
        """R, the number of samples."""
        return len(self.gradients)

    @property
    def one_hot(self) -> bool:
        """Whether inputs are numbers of tokens."""
        return not self.inputs.is_floating_point()

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of a sample's gradient."""
        return self.gradients.shape[-1], self.width

    def take(self, rows: Tensor) -> "KhatriRao":
        """Return some of the samples."""
        return KhatriRao(self.inputs[rows], self.gradients[rows], self.width)

    def scaled(self, factors: Tensor | float) -> "KhatriRao":
        """Return the samples' gradients times a number, or times one for each, (R,)."""
        by = factors[:, None, None] if isinstance(factors, Tensor) else factors
        return KhatriRao(self.inputs, self.gradients * by, self.width)

    def squared_norms(self) -> Tensor:
        """Return |u_k|^2, (R,)."""
        if self.gradients.shape[1] == 1:
            size = 1.0 if self.one_hot else self.inputs.square().sum((1, 2))
            return self.gradients.square().sum((1, 2)) * size
        (m, n), t = self.shape, self.gradients.shape[1]
        written_out = m * n < t * (m + n)
        step = max(1, CHUNK // max(1, m * n if written_out else t * t))
        parts = (
            KhatriRao(x, g, n) for x, g in zip(self.inputs.split(step), self.gradients.split(step), strict=True)
        )
        if written_out:
            return torch.cat([part.matrices().square().sum((1, 2)) for part in parts])
        return torch.cat([(part._alike() * (part.gradients @ part.gradients.mT)).sum((1, 2)) for part in parts])

    def _alike(self) -> Tensor:
        """Inner products of the inputs of each sample, (R, T, T)."""
        if self.one_hot:
            return (self.inputs[:, :, None] == self.inputs[:, None, :]).to(self.gradients.dtype)
        return self.inputs @ self.inputs.mT

    def gram(self, other: "KhatriRao | None" = None) -> Tensor:
        """Return U'U, or U' of another's U, (R, R')."""
        other = self if other is None else other
        (m, n), t, s = self.shape, self.gradients.shape[1], other.gradients.shape[1]
        through_positions = len(self) * len(other) * t * s * (m + n)
        written_out = (len(self) * t + len(other) * s + len(self) * len(other)) * m * n
        if t * s > 1 and written_out < through_positions:
            return self._gram_of_matrices(other)
        return self._gram_of_positions(other)

    def _gram_of_positions(self, other: "KhatriRao") -> Tensor:
        """Sum the Hadamard product over pairs of positions: R R' T T' (m + n) multiplications."""
        t, s = self.gradients.shape[1], other.gradients.shape[1]
        found = self.gradients.new_zeros(len(self), len(other))
        step = max(1, CHUNK // max(1, t * s * len(other)))
        rights = other.inputs.flatten(0, 1), other.gradients.flatten(0, 1)
        for low in range(0, len(self), step):
            x, g = self.inputs[low : low + step].flatten(0, 1), self.gradients[low : low + step].flatten(0, 1)
            alike = (x[:, None] == rights[0]).to(g.dtype) if self.one_hot else x @ rights[0].mT
            pairs = alike * (g @ rights[1].mT)
            found[low : low + step] = pairs.view(len(x) // t, t, len(other), s).sum((1, 3))
        return found

    def _gram_of_matrices(self, other: "KhatriRao") -> Tensor:
        """Write the samples' gradients out, some rows at a time: (R T + R' T' + R R') m n multiplications."""
        m, n = self.shape
        found = self.gradients.new_zeros(len(self), len(other))
        step = max(1, CHUNK // max(1, (len(self) + len(other)) * n))
        for low in range(0, m, step):
            mine = self._matrices(low, low + step).flatten(1)
            found += mine @ (mine if other is self else other._matrices(low, low + step).flatten(1)).mT
        return found

    def _matrices(self, low: int, high: int) -> Tensor:
        """Some rows of all samples' gradients, (R, high - low, n)."""
        part = self.gradients[:, :, low:high]
        if not self.one_hot:
            return part.mT @ self.inputs
        found = part.new_zeros(len(self), self.width, part.shape[-1])
        places = self.inputs[:, :, None].expand_as(part)
        return found.scatter_add_(1, places, part).mT

    def matrices(self) -> Tensor:
        """Return all samples' gradients, (R, m, n)."""
        return self._matrices(0, self.shape[0])

    def squares(self) -> Tensor:
        """Return sum_k u_k * u_k, entry by entry, (m, n)."""
        if self.one_hot:
            return self._squares_of_tokens()
        if self.gradients.shape[1] == 1:
            return self.gradients[:, 0].square().mT @ self.inputs[:, 0].square()
        m, n = self.shape
        step = max(1, CHUNK // max(1, len(self) * n))
        parts = (self._matrices(low, low + step) for low in range(0, m, step))
        return torch.cat([part.square().sum(0) for part in parts])

    def _squares_of_tokens(self) -> Tensor:
        """Add up what one sample has at the same token before squaring; no matrix per sample."""
        (m, n), samples = self.shape, torch.arange(len(self), device=self.inputs.device)
        pairs, places = (samples[:, None] * n + self.inputs).unique(return_inverse=True)
        sums = self.gradients.new_zeros(len(pairs), m).index_add_(
            0, places.flatten(), self.gradients.flatten(0, 1)
        )
        return sums.new_zeros(n, m).index_add_(0, pairs % n, sums.square()).mT

    def products(self, matrix: Tensor) -> Tensor:
        """Return U' vec V for V (m, n), (R,)."""
        if self.one_hot:
            return (self.gradients * matrix.mT[self.inputs]).sum((1, 2))
        return ((self.inputs @ matrix.mT) * self.gradients).sum((1, 2))

    def combination(self, weights: Tensor) -> Tensor:
        """Return U c for c (R,), the (m, n) matrix sum_k c_k u_k."""
        weighted = (self.gradients * weights[:, None, None]).flatten(0, 1)
        if not self.one_hot:
            return weighted.mT @ self.inputs.flatten(0, 1)
        found = weighted.new_zeros(self.width, weighted.shape[1])
        return found.index_add_(0, self.inputs.flatten(), weighted).mT


Sharing = Callable[[KhatriRao], KhatriRao]
"""What becomes of samples with several positions, such as tokens or places in an image."""


def exact(samples: KhatriRao) -> KhatriRao:
    """Keep each sample's gradient as the sum over its positions that it is."""
    return samples


def expanded(samples: KhatriRao) -> KhatriRao:
    """Let each position be a sample of its own: what two positions of one sample share is neglected.

    References: Eschenhagen, Immer, Turner, Schneider, Hennig, "Kronecker-factored approximate curvature for
        modern neural network architectures", 2023, arXiv 2311.00636 ("expand").
    """
    inputs, gradients = samples.inputs.flatten(0, 1), samples.gradients.flatten(0, 1)
    return KhatriRao(inputs[:, None], gradients[:, None], samples.width)


def reduced(samples: KhatriRao) -> KhatriRao:
    """Let the mean input and the sum of the gradients stand for a sample's positions, one product for all.

    Positions without a gradient, such as those that fill samples up to the same length, are none. Numbers of
    tokens have no mean; they are expanded.

    References: as for :func:`expanded` ("reduce"); HyLo sees convolutions so.
    """
    if samples.one_hot:
        return expanded(samples)
    counted = with_gradient(samples.gradients).unsqueeze(-1)  # (R, T, 1)
    inputs = (samples.inputs * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp_min(1)
    return KhatriRao(inputs, samples.gradients.sum(1, keepdim=True), samples.width)


def averaged(samples: KhatriRao) -> KhatriRao:
    """Let the mean input and the mean gradient stand for a sample's T positions: T times less than ``reduced``.

    The Fisher matrix is T^2 times smaller, so that a damping acts T^2 times stronger. The released code of HyLo
    sees convolutions so; it is here for reproductions alone.
    """
    positions = 1 if samples.one_hot else samples.gradients.shape[1]
    return reduced(samples).scaled(1 / positions)


def with_gradient(gradients: Tensor) -> Tensor:
    """Return one for each position with a gradient, and zero for those that say nothing, (R, T)."""
    return (gradients != 0).any(-1).to(gradients.dtype)
