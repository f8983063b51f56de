"""What a module gets that reads the weight of a structured layer instead of calling the layer."""

from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map

from ..matrices import StructuredMatrix

_PRODUCTS = (torch.matmul, torch.mm, Tensor.__matmul__, Tensor.matmul, Tensor.mm)
_FLIPPED: Any = (Tensor.T, Tensor.mT)
_PASSED = frozenset(
    [
        "__deepcopy__",
        "__format__",
        "__get__",
        "__len__",
        "__reduce_ex__",
        "__repr__",
        "__set__",
        "__setitem__",
        "as_subclass",
        "bfloat16",
        "clone",
        "contiguous",
        "cpu",
        "cuda",
        "data_ptr",
        "detach",
        "dim",
        "double",
        "element_size",
        "float",
        "get_device",
        "half",
        "nelement",
        "numel",
        "size",
        "storage_offset",
        "stride",
        "to",
        "type",
        "untyped_storage",
    ]
)
_TRANSPOSES = (torch.t, Tensor.t, *(each.__get__ for each in _FLIPPED))


class Standing(Tensor):
    """An empty tensor with the type and place of a weight, whose products with others are those of the matrix.

    So ``linear(x, weight)``, ``x @ weight.T`` and ``weight @ x`` compute what they did. For what else computes
    with it, such as ``weight.norm()``, the matrix is written out. Where it is copied, moved, filled or asked
    about, it is an empty tensor.
    """

    matrix: StructuredMatrix
    transposed: bool
    _is_hf_initialized = True  # transformers' mark: there is nothing to draw random numbers for

    @classmethod
    def of(cls, empty: Tensor, matrix: StructuredMatrix, transposed: bool = False) -> Self:
        """Stand for an (m, n) matrix, or its transpose."""
        found = empty.as_subclass(cls)
        found.matrix, found.transposed = matrix, transposed
        return found

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.as_subclass(Tensor).clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def rows(self, x: Tensor, adjoint: bool) -> Tensor:
        """Apply the matrix, (..., n) -> (..., m), or its adjoint."""
        return self.matrix.adjoint(x) if adjoint else self.matrix(x)

    def written(self) -> Tensor:
        """Return the matrix as it is stored."""
        dense = self.matrix.dense()
        return dense.mT if self.transposed else dense

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute products, and write the matrix out for what else computes."""
        match args:
            case (Standing() as w,) if func in _TRANSPOSES:
                return cls.of(w.as_subclass(Tensor), w.matrix, not w.transposed)
            case (Tensor() as x, Standing() as w, *more) if func is functional.linear:
                bias = more[0] if more else (kwargs or {}).get("bias")
                if bias is not None and not w.transposed:
                    return w.matrix.affine(x, bias)
                y = w.rows(x, w.transposed)
                return y if bias is None else y + bias
            case (Standing() as w, Tensor() as x) if func in _PRODUCTS:
                return w.rows(x, w.transposed) if x.dim() == 1 else w.rows(x.mT, w.transposed).mT
            case (Tensor() as x, Standing() as w) if func in _PRODUCTS:
                return w.rows(x, not w.transposed)
        if _computes(func, args[0] if args else None):
            args, kwargs = tree_map(lambda x: x.written() if isinstance(x, cls) else x, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _computes(func: Any, first: Any) -> bool:
    """Whether a function reads the numbers of a weight, and does not merely copy, change or ask about it."""
    name = getattr(func, "__name__", "")
    if name in _PASSED or name.startswith(("is_", "new_", "__i")) or name.endswith("_like"):
        return False
    return name.endswith("__") or not name.endswith("_") or not isinstance(first, Standing)
