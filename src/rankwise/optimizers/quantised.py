"""What transforms remember, in few bits."""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.directions import Direction, formed
from ..core.methods import check_count
from ..core.states import State
from ..core.subspaces import Subspace
from ..core.transforms import Transform, within
from ..linalg import decode, encode
from .adam import adam

CODED = {"codes", "scales", "shape"}


@dataclass(frozen=True, kw_only=True)
class Quantised(Transform):
    """Keep the state of another transform in few bits between steps; see :func:`quantised`."""

    inner: Transform
    bits: int = 8
    block: int = 256
    least: int = 4096

    def __post_init__(self) -> None:
        if self.bits not in range(2, 9):
            raise ValueError(f"bits must be 2 ... 8, got {self.bits}.")
        check_count("block", self.block)
        check_count("least", self.least)
        if any(isinstance(part, Quantised) for part in within(self)):
            raise ValueError("the state of what is inside is in few bits already; leave one quantised(...) out.")

    def init(self, param: Tensor, index: Tensor) -> State:
        """The inner state, with codes, scales and a shape in the place of each long tensor."""
        return self._coded(self.inner.init(param, index))

    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """The inner direction (k, ...)."""
        return formed(self.update_unformed(grad, state, param))

    def update_unformed(self, grad: Tensor, state: State, param: Tensor) -> Direction:
        """The inner direction (k, ...)."""
        inner = _decoded(state, self, grad.dtype)
        direction = self.inner.update_unformed(grad, inner, param)
        _put(state, self._coded(inner))
        return direction

    def reduce(self, grad: Tensor, state: State, param: Tensor) -> Tensor | None:
        """The inner reduced form."""
        if type(self.inner).reduce is Transform.reduce:
            return None  # nothing needs to be read
        return self.inner.reduce(grad, _decoded(state, self, grad.dtype), param)

    def update_reduced(self, low: Tensor, state: State, param: Tensor) -> Direction:
        """The inner direction (k, ...)."""
        inner = _decoded(state, self, low.dtype)
        direction = self.inner.update_reduced(low, inner, param)
        _put(state, self._coded(inner))
        return direction

    def acting_on(self, param: Tensor) -> Transform:
        """That of the inner one, in as few bits."""
        return dataclasses.replace(self, inner=self.inner.acting_on(param))

    def rotate(self, state: State, rotation: Tensor) -> None:
        """Rotate the inner state."""
        inner = _decoded(state, self, rotation.dtype)
        self.inner.rotate(inner, rotation)
        _put(state, self._coded(inner))

    @property
    def reads_param(self) -> bool:
        """Whether the inner transform does."""
        return self.inner.reads_param

    @property
    def constrains(self) -> bool:
        """Whether the inner transform does."""
        return self.inner.constrains

    def constrain(self, param: Tensor, state: State, lr: float, weight_decay: float) -> Tensor:
        """The inner constraint."""
        inner = _decoded(state, self, param.dtype)
        bounded = self.inner.constrain(param, inner, lr, weight_decay)
        _put(state, self._coded(inner))
        return bounded

    @functools.cached_property
    def _whole(self) -> frozenset[str]:
        """The entries that stay as they are, of the inner transform and of all within."""
        parts = [part for part in within(self) if isinstance(part, (Transform, Subspace))]
        return frozenset(name for part in parts for name in part.exact)

    def _coded(self, inner: State) -> State:
        """Write long tensors of numbers as codes."""
        return {
            key: value
            if key in self._whole
            else self._coded(value)
            if isinstance(value, Mapping)
            else self._leaf(value)
            for key, value in inner.items()
        }

    def _leaf(self, value: Tensor) -> Any:
        if not value.is_floating_point() or value[0].numel() < self.least:
            return value
        codes, scales = encode(value.reshape(len(value), -1), self.bits, self.block)
        shape = torch.tensor([value.shape[1:]] * len(value), dtype=torch.int64)
        return {"codes": codes, "scales": scales, "shape": shape}


def _decoded(state: State, about: Quantised, dtype: torch.dtype) -> dict[str, Any]:
    """Return the inner state; what is coded becomes new tensors, all else is the state's own."""
    inner: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(value, Mapping):
            inner[key] = value
        elif value.keys() == CODED:
            shape = value["shape"][0]
            read = decode(value["codes"], value["scales"], int(shape.prod()), about.bits, about.block)
            inner[key] = read.view(-1, *shape.tolist()).to(dtype)
        else:
            inner[key] = _decoded(value, about, dtype)
    return inner


def _put(state: State, new: State) -> None:
    """Write what was coded anew."""
    for key, value in new.items():
        if not isinstance(value, Mapping):
            if value is not state[key]:
                state[key].copy_(value)
        else:
            _put(state[key], value)


def quantised(inner: Transform, *, bits: int = 8, block: int = 256, least: int = 4096) -> Transform:
    """Keep what another transform remembers in 8 bits, or fewer, between steps.

    Any transform may be inside. Its counters, its short tensors and what it declares ``exact``, such as bases of
    subspaces, stay as they are.
    It may stand around a projection or around what is inside of one: that is the same, but for one rounding more
    where moments are carried.

    >>> import torch
    >>> from rankwise.core.transforms import state_bytes
    >>> from rankwise.optimizers import sgd
    >>> weight = torch.empty(64, 256, device="meta")
    >>> [state_bytes(each, weight) for each in (sgd(beta=0.9), quantised(sgd(beta=0.9)))]
    [65536, 16656]

    Args:
        inner: the transform.
        bits: of a number, 2 to 8; 4 needs shorter blocks, of 128.
        block: how many neighbours share a scale.
        least: tensors with fewer numbers a parameter stay as they are.

    Raises:
        ValueError: if an argument is out of range, or something inside is quantised already.

    References: Dettmers et al., 2022, arXiv 2110.02861; 4 bits: Li et al., 2023, arXiv 2309.01507. Means that
    move slowly are rounded to where they were: with a beta of 0.999 most squares grow at once, and fall only with
    the largest of their block. This is so in the published codes too.
    """
    return Quantised(inner=inner, bits=bits, block=block, least=least)


def adamw8bit(*, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> Transform:
    """Adam with moments of 8 bits; with the ``weight_decay`` of :class:`rankwise.Optimizer` it is AdamW.

    Two bytes a number, and 8 more for 256; vectors and other tensors below 4096 numbers keep float32.

    >>> import torch
    >>> from rankwise.core.transforms import state_bytes
    >>> state_bytes(adamw8bit(), torch.empty(64, 256, device="meta")) / (64 * 256)
    2.033...

    Args:
        betas: of Adam.
        eps: of Adam.

    References: Dettmers et al., 2022, arXiv 2110.02861. There, squares far below the largest of their block
    become zero, and the steps of such numbers as long as their mean over eps; here they stay above zero.
    """
    return quantised(adam(betas=betas, eps=eps))


def adamw4bit(*, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> Transform:
    """Adam with moments of 4 bits, in blocks of 128: one byte a number, and 8 more for 128.

    >>> adamw4bit().bits
    4

    Args:
        betas: of Adam.
        eps: of Adam.

    References: Li et al., 2023, arXiv 2309.01507. There, squares have evenly spaced values; here those of dynamic
    codes, of which zero is for zeros alone.
    """
    return quantised(adam(betas=betas, eps=eps), bits=4, block=128)
