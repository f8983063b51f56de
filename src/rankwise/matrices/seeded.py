"""A matrix of random numbers that are drawn again instead of being stored."""

import math
import weakref
import zlib
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Generator, Tensor

from .base import StructuredMatrix, shape_of


class Seeded(StructuredMatrix):
    """An (m, n) matrix of uniform random numbers of mean 0 and variance 1, of which only the seed is kept.

    It does not train. Matrices of one seed and shape are one tensor in memory, on each device, as long as any of
    them lives. The numbers are integers of torch's generator for CPUs times a constant, so they are the same on
    all machines, which normal numbers, made by a machine's own logarithms, are not. A checksum is stored as a
    buffer of one integer; loading a checksum that does not fit is an error. The numbers are float32, used in the
    type of the input.

    Args:
        m: rows.
        n: columns.
        seed: from 0 to 2^62.
        device: where the numbers are used.

    >>> one, two = Seeded(3, 2, seed=1), Seeded(3, 2, seed=1)
    >>> one.dense().data_ptr() == two.dense().data_ptr(), list(one.state_dict())
    (True, ['checksum'])
    """

    checksum: Tensor

    def __init__(self, m: int, n: int, seed: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= 2**62:
            raise ValueError(f"seed must be an integer from 0 to 2^62, got {seed!r}.")
        self.shape, self.seed = (m, n), seed
        self.register_buffer("checksum", torch.empty((), dtype=torch.int64, device=device))
        self._fetch()
        if not self.checksum.is_meta:
            self.checksum.fill_(self._drawn.checksum)

    @property
    def values(self) -> Tensor:
        """(m, n) in float32, shared; not to be written into."""
        if self._drawn.values.device != self.checksum.device:  # the buffer was replaced
            self._fetch()
        return self._drawn.values

    def _fetch(self) -> None:
        """Hold the numbers that all matrices of this seed and shape share, where the checksum is."""
        key = (self.seed, self.shape, self.checksum.device)
        found = _SHARED.get(key)
        if found is None:
            found = _SHARED[key] = _Drawn(*key)
        self._drawn = found

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move to another device."""
        super()._apply(fn, recurse)
        self._fetch()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_drawn"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._fetch()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        try:
            self.check()
        except ValueError as error:
            error_msgs.append(str(error))

    @property
    def macs(self) -> int:
        """One multiply-add an entry."""
        return self.shape[0] * self.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        return x @ self.values.to(x.dtype).mT

    def adjoint(self, y: Tensor) -> Tensor:
        """(..., m) -> (..., n)."""
        return y @ self.values.to(y.dtype)

    def dense(self) -> Tensor:
        """(m, n) in float32, shared; not to be written into."""
        return self.values

    def check(self) -> None:
        """Raise unless the numbers are those whose checksum is stored."""
        if not self.values.is_meta and int(self.checksum) != self._drawn.checksum:
            raise ValueError(
                f"seed {self.seed} does not draw the {self.shape} numbers that were saved: the seed is another "
                "one, the file is damaged, or torch's generator has changed."
            )

    def spec(self) -> dict[str, Any]:
        """Kind, shape and seed."""
        return {"kind": "Seeded", "shape": list(self.shape), "seed": self.seed}

    @classmethod
    def empty(cls, spec: Mapping[str, Any], **where: Any) -> Self:
        """The numbers of the spec's seed."""
        seed: Any = spec.get("seed")
        return cls(*shape_of(spec), seed, where.get("device"))


class _Drawn:
    """Numbers of a seed, and their checksum."""

    def __init__(self, seed: int, shape: tuple[int, int], device: torch.device) -> None:
        if device.type == "meta":
            self.values, self.checksum = torch.empty(shape, dtype=torch.float32, device=device), 0
            return
        with torch.inference_mode(False):
            generator = Generator("cpu").manual_seed(seed)
            values = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
            values.mul_(2).sub_(1).mul_(math.sqrt(3))
            self.values, self.checksum = values.to(device), zlib.crc32(values.numpy().data)


_SHARED: weakref.WeakValueDictionary[Any, _Drawn] = weakref.WeakValueDictionary()
