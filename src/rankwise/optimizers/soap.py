"""Adam in the eigenvectors of Shampoo's second moments."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.combining import by_shape
from ..core.states import State, counter, put, take
from ..core.transforms import Transform
from ..linalg import orthonormal
from ..projectors import Every
from .adam import Adam

SIDES = (("left", -2), ("right", -1))
DAMPING = 1e-5


@dataclass(frozen=True, kw_only=True)
class EigenAdam(Transform):
    """Run Adam on Q' G P, where Q and P are eigenvectors of running means of G G' and G' G.

    The bases of a step come from the gradients before. They are the axes at the first step, eigenvectors after
    it, and later one power step and a QR go on from the last ones. Means turn with the bases; squares do not,
    their rows and columns are only put in the order of the eigenvalues.

    Args:
        adam: what runs in these bases.
        refresh: when bases go on.
        beta: how much of the means of G G' and G' G stays at each step.
        largest: sides that are longer stay as they are.
    """

    adam: Adam
    refresh: Every
    beta: float
    largest: int
    exact: ClassVar[tuple[str, ...]] = ("basis",)

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must be from 0 to below 1, got {self.beta}.")
        if self.largest < 0:
            raise ValueError(f"largest must be >= 0, got {self.largest}.")

    def init(self, param: Tensor, index: Tensor) -> State:
        """The means, their bases, and the state of Adam."""
        state = {
            "step": counter(index),
            "refresh": self.refresh.init(index),
            "adam": self.adam.init(param, index),
        }
        for name, axis in SIDES:
            side = param.shape[axis]
            if side <= self.largest:
                gram = param.new_zeros(len(param), side, side)
                basis = torch.eye(side, dtype=param.dtype, device=param.device).expand_as(gram)
                state[name] = {"gram": gram, "basis": basis.contiguous()}
        return state

    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """(k, m, n) -> (k, m, n)."""
        step = back(self.adam.update(turned(grad, state), state["adam"], param), state)
        for name, axis in SIDES:
            if name in state:
                values = grad if axis == -2 else grad.mT
                state[name]["gram"].lerp_(values @ values.mT, 1 - self.beta)
        count = state["step"].add_(1)
        due = self.refresh.due(count, state["refresh"], lambda: torch.ones(len(grad)))
        for chosen, move in ((count == 1, self._begin), (due & (count > 1), self._go_on)):
            rows = chosen.nonzero().flatten()
            if len(rows) == len(chosen):
                move(state, grad)
            elif len(rows):
                some = take(state, rows)
                move(some, grad[rows])
                put(state, rows, some)
        return step

    def _begin(self, state: State, grad: Tensor) -> None:
        """Turn to eigenvectors, with the squares that the first gradient has there."""
        mean, square, (b1, b2) = state["adam"]["mean"], state["adam"]["square"], self.adam.betas
        exact = grad.double()
        for name, axis in SIDES:
            if name in state:
                values = exact if axis == -2 else exact.mT
                state[name]["basis"].copy_(eigenvectors(values @ values.mT))
        mean.copy_(turned(mean, state))
        square.copy_(mean.square() * ((1 - b2) / (1 - b1) ** 2))

    def _go_on(self, state: State, _: Tensor) -> None:
        """Sort the bases, improve them, and turn the mean."""
        mean, square = state["adam"]["mean"], state["adam"]["square"]
        original = back(mean, state)
        for name, axis in SIDES:
            if name in state:
                gram, basis = state[name]["gram"], state[name]["basis"]
                image = gram @ basis
                order = (basis * image).sum(-2).sort(dim=-1, descending=True, stable=True).indices  # (k, side)
                columns = order[:, None, :].expand_as(basis)
                image, sorted_basis = image.gather(-1, columns), basis.gather(-1, columns)
                basis.copy_(orthonormal(image + damping(gram) * sorted_basis))
                across = order[:, :, None] if axis == -2 else order[:, None, :]
                square.copy_(square.gather(axis, across.expand_as(square)))
        mean.copy_(turned(original, state))


def turned(values: Tensor, state: Mapping[str, State]) -> Tensor:
    """Return (k, m, n) in the bases of both sides."""
    values = state["left"]["basis"].mT @ values if "left" in state else values
    return values @ state["right"]["basis"] if "right" in state else values


def back(values: Tensor, state: Mapping[str, State]) -> Tensor:
    """Return (k, m, n) as it was before ``turned``."""
    values = state["left"]["basis"] @ values if "left" in state else values
    return values @ state["right"]["basis"].mT if "right" in state else values


def damping(gram: Tensor) -> Tensor:
    """Return a small part of the mean eigenvalue (k, 1, 1); directions without gradients go on as they were."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    return DAMPING * mean + torch.finfo(gram.dtype).tiny


def eigenvectors(gram: Tensor) -> Tensor:
    """Return eigenvectors (k, s, s) of symmetric matrices, that of the largest eigenvalue first.

    A small diagonal that falls is added, so that rounding does not choose the vectors of eigenvalue zero. For
    that the products have to be more exact than it is small, which those of float64 are.
    """
    fall = torch.linspace(1, 0, gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.eigh(gram + damping(gram) * fall.diag()).eigenvectors.flip(-1)


def soap(
    *,
    every: int | Every = 10,
    betas: tuple[float, float] = (0.95, 0.95),
    eps: float = 1e-8,
    beta: float = 0.95,
    largest: int = 10_000,
) -> Transform:
    """SOAP: Adam in slowly turning bases in which the gradient's rows and columns hardly correlate.

    Few steps are needed, with a state of 2 (m n + m^2 + n^2) numbers; vectors get Adam. With no side up to
    ``largest`` it is Adam.

    >>> import torch
    >>> from rankwise.core.transforms import state_bytes
    >>> state_bytes(soap(), torch.empty(30, 50, device="meta")) - 4 * 2 * (30 * 50 + 30**2 + 50**2)  # counters
    24

    Args:
        every: steps between two changes of a matrix's bases; matrices take turns, if not ``together`` as in the
            published code.
        betas: of Adam.
        eps: of Adam.
        beta: how much of the second moments stays at each step.
        largest: sides that are longer stay as they are, those of embeddings for instance.

    References: Vyas et al., ICLR 2025, arXiv 2409.11321. There the first step is left out; here it is Adam's.
    Convolutions are matrices (out, rest) here, there each of their sides has a basis. There eps is added before
    the bias of the start is taken out.
    """
    adam = Adam(betas=betas, eps=eps)
    refresh = every if isinstance(every, Every) else Every(every)
    return by_shape(matrix=EigenAdam(adam=adam, refresh=refresh, beta=beta, largest=largest), other=adam)
