"""The one value that carries structure: an (m, n) matrix kept in factors."""

import abc
import contextlib
import itertools
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional


class StructuredMatrix(nn.Module, abc.ABC):
    """An (m, n) matrix kept in factors; calling it applies it to the last axis.

    Subclasses are final. Every tensor they store is a parameter or a persistent buffer, so that
    ``state_dict`` and :meth:`spec` together hold the whole value.
    """

    shape: tuple[int, int]

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Apply the matrix: (..., n) -> (..., m), equal to ``x @ self.dense().mT``."""

    @abc.abstractmethod
    def dense(self) -> Tensor:
        """Return the (m, n) matrix written out."""

    @abc.abstractmethod
    def spec(self) -> dict[str, Any]:
        """Return kind and sizes as JSON data: with the ``state_dict``, enough to rebuild the matrix."""

    @classmethod
    @abc.abstractmethod
    def empty(cls, spec: Mapping[str, Any], **where: Any) -> Self:
        """Rebuild the matrix of a spec with uninitialised tensors.

        Args:
            spec: what :meth:`spec` returned.
            where: ``dtype`` and ``device`` of the floating-point tensors.

        Raises:
            ValueError: if a size is missing, not an integer, or impossible.
        """

    @property
    @abc.abstractmethod
    def macs(self) -> int:
        """Multiply-adds to apply the matrix to one vector."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the first stored floating-point number, or else torch's default."""
        stored = (t.dtype for t in itertools.chain(self.parameters(), self.buffers()) if t.is_floating_point())
        return next(stored, torch.get_default_dtype())

    @property
    def device(self) -> torch.device:
        """Where the stored numbers are."""
        return next((t.device for t in itertools.chain(self.parameters(), self.buffers())), torch.device("cpu"))

    @property
    def rank(self) -> int:
        """The largest rank that the structure allows."""
        return min(self.shape)

    @property
    def params(self) -> int:
        """How many numbers are stored, indices included; kinds that pack several into a byte count otherwise."""
        return sum(t.numel() for t in self.state_dict().values())

    @property
    def nbytes(self) -> int:
        """How many bytes the stored numbers take."""
        return sum(t.numel() * t.element_size() for t in self.state_dict().values())

    def affine(self, x: Tensor, bias: Tensor) -> Tensor:
        """Apply the matrix and add a bias (m,): (..., n) -> (..., m), rounded once where that costs nothing."""
        return self(x) + bias

    def adjoint(self, y: Tensor) -> Tensor:
        """Apply the transpose: (..., m) -> (..., n), equal to ``y @ self.dense()``."""
        return y @ self.dense()

    def added(self, x: Tensor, product: Tensor) -> Tensor:
        """Return what an adapter adds to its base's product with x: (..., n), (..., m) -> (..., m)."""
        return self(x) - product

    def lookup(self, index: Tensor) -> Tensor:
        """Return columns: (...) integers -> (..., m), what forward makes of rows that are zero but for a one.

        This is how an embedding's table, transposed, is applied to the numbers of tokens.
        """
        return functional.embedding(index, self.dense().mT)

    def lookup_through(self, left: "StructuredMatrix", index: Tensor) -> Tensor:
        """Return columns of the product ``left @ self``: (...) integers -> (..., rows of ``left``)."""
        return left(self.lookup(index))

    def check(self) -> None:
        """Raise ValueError if stored numbers are impossible, such as an order that is no permutation."""

    def extra_repr(self) -> str:
        """Show the shape in ``print(model)``."""
        return f"shape={self.shape}, rank={self.rank}"


Place = tuple[str, str]  # a layer, and the path of a part inside its matrix, "" for the whole


def shared_parts(
    matrix: StructuredMatrix, layer: str, known: dict[int, Place]
) -> list[tuple[str, StructuredMatrix, Place]]:
    """Find what of a layer's matrix is a matrix met before, and remember the rest of it.

    Args:
        matrix: may be a part of others, or have such parts.
        layer: that has it.
        known: places of the matrices met before, by identity; those of this one are added.

    Returns:
        path inside the matrix, part, and former place of each such part; not of their own parts.
    """
    found: list[tuple[str, StructuredMatrix, Place]] = []
    for path, part in matrix.named_modules():
        inside = any(not outer or f"{path}.".startswith(f"{outer}.") for outer, _, _ in found)
        if inside or not isinstance(part, StructuredMatrix):
            continue
        if id(part) in known:
            found.append((path, part, known[id(part)]))
        else:
            known[id(part)] = layer, path
    return found


def check_parts(path: str, matrix: nn.Module) -> None:
    """Check a matrix, or a module around one, and all matrices in it; those without values are passed over.

    Raises:
        ValueError: if stored numbers are impossible, with the path of their matrix.
    """
    for inside, part in matrix.named_modules():
        if isinstance(part, StructuredMatrix) and not any(t.is_meta for t in part.state_dict().values()):
            try:
                part.check()
            except ValueError as error:
                raise ValueError(f"{f'{path}.{inside}'.rstrip('.')}: {error}") from error


def autocast_of(device: torch.device) -> torch.dtype | None:
    """Return the type that torch casts to on a device at the moment, or None if it does not."""
    kind = device.type
    casting = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if casting else None


def widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in the type of the numbers that multiply it; under autocast as it is, since torch converts it."""
    return x if autocast_of(x.device) is not None else x.to(dtype)


def as_given(y: Tensor, x: Tensor) -> Tensor:
    """Return a result in the type of the input x; under autocast as it is, as torch's own layers do."""
    return y if autocast_of(x.device) is not None else y.to(x.dtype)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which torch does not cast what is computed on a device."""
    return contextlib.nullcontext() if autocast_of(device) is None else torch.autocast(device.type, enabled=False)


LARGEST = 2**28  # of a size; products of two and their bytes still fit in 64 bits


def size(spec: Mapping[str, Any], name: str, *, least: int = 1, largest: int = LARGEST) -> int:
    """Read an integer from a spec, or say what is wrong with it."""
    value = spec.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        what = "a positive integer" if least == 1 else f"an integer >= {least} as"
        raise ValueError(f"spec of {spec.get('kind')} needs {what} {name!r}, got {value!r}.")
    if value > largest:
        raise ValueError(f"spec of {spec.get('kind')}: {name} must be <= {largest}, got {value}.")
    return value


def shape_of(spec: Mapping[str, Any]) -> tuple[int, int]:
    """Read the (m, n) of a spec, or say what is wrong with it."""
    value = spec.get("shape")
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"spec of {spec.get('kind')} needs 'shape': [m, n], got {value!r}.")
    sizes = dict(zip(("m", "n"), value, strict=True))
    return size({"kind": spec.get("kind"), **sizes}, "m"), size({"kind": spec.get("kind"), **sizes}, "n")


def check_2d(name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` is a floating-point matrix."""
    if tensor.dim() != 2 or not tensor.is_floating_point():
        raise TypeError(f"{name} must be a 2-D floating-point tensor, got {tensor.dtype} {tuple(tensor.shape)}.")


class TooSmallError(ValueError):
    """A matrix has too few rows or columns for what is asked of it."""


def check_rank(rank: int, m: int, n: int) -> None:
    """Raise unless an (m, n) matrix can have the rank."""
    if not 1 <= rank <= min(m, n):
        raise (TooSmallError if rank > 0 else ValueError)(
            f"the rank of an ({m}, {n}) matrix is in 1 ... {min(m, n)}, got {rank}."
        )


def check_permutation(order: Tensor) -> None:
    """Raise unless ``order`` (k,) holds 0 ... k - 1 once each."""
    if not torch.equal(order.long().sort().values, torch.arange(len(order), device=order.device)):
        raise ValueError(f"order must hold each of 0 ... {len(order) - 1} once; the tensor is damaged.")
