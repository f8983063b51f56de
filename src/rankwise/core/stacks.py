"""Several matrices that a module keeps in one 3-D parameter, as the experts of a mixture are kept."""

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..matrices import StructuredMatrix


class Slice(nn.Module):
    """One matrix of a stack as it is, a linear layer whose weight may be stored as (n, m).

    Args:
        weight: (m, n), or (n, m) if ``transposed``.
        transposed: how it is stored.
        bias: (m,), or None; the parameter that the slice is cut from has none.
    """

    def __init__(self, weight: nn.Parameter, transposed: bool, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight, self.transposed, self.bias = weight, transposed, bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        if not self.transposed:
            return functional.linear(x, self.weight, self.bias)
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class _Like:
    """Has the type and the place of ``like``, as a tensor has its own."""

    like: Any  # a tensor, or a property that gives one

    @property
    def dtype(self) -> torch.dtype:
        """Type of the numbers."""
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.like.device


class Operand(_Like):
    """Stands for a matrix of a stack in ``linear(x, W)`` or ``x @ W``, which its layer then computes.

    Args:
        layer: takes rows (..., n) to (..., m).
        like: a tensor on the device and of the type that the matrix has.
        shape: of the matrix as it stands in the expression.
        transposed: whether that is (n, m).
    """

    def __init__(self, layer: nn.Module, like: Tensor, shape: torch.Size, transposed: bool) -> None:
        self.layer, self.like, self.shape, self.transposed = layer, like, shape, transposed

    @property
    def mT(self) -> "Operand":
        """The transpose."""
        return Operand(self.layer, self.like, torch.Size(reversed(self.shape)), not self.transposed)

    T = mT

    def t(self) -> "Operand":
        """The transpose."""
        return self.mT

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute the product of rows and the matrix; refuse everything else."""
        match args:
            case (Tensor() as x, Operand() as w) if func is functional.linear and not w.transposed:
                return _biased(w.layer(x), kwargs)
            case (Tensor() as x, Operand() as w, bias) if func is functional.linear and not w.transposed:
                return _biased(w.layer(x), {"bias": bias})
            case (Tensor() as x, Operand() as w) if func in _PRODUCTS and w.transposed:
                return w.layer(x)
            case _:
                raise _misused(func)


class Stack(_Like, nn.Module):
    """Stands where a 3-D parameter stood; each of its matrices is a layer of its own, under its number.

    ``stack[i]`` goes where the slice of the parameter went, and the stack itself into a batched product.

    Args:
        parameter: (e, m, n), or (e, n, m) if ``transposed``. The layers share its memory.
        transposed: how the matrices are stored.
    """

    def __init__(self, parameter: nn.Parameter, transposed: bool) -> None:
        super().__init__()
        self.shape, self.transposed, self.requires = parameter.shape, transposed, parameter.requires_grad
        self.order: tuple[str, ...] = ()  # the names of all parameters that its module had
        self.batched = False  # whether it was used in a batched product, which gives every matrix as many rows
        for i, part in enumerate(parameter.detach().unbind()):
            self.add_module(str(i), Slice(nn.Parameter(part, requires_grad=self.requires), transposed))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, i: Any) -> Operand:
        if isinstance(i, Tensor) and i.numel() != 1:
            raise _misused("a choice of several")
        number = int(i)
        if not -len(self) <= number < len(self):
            raise IndexError(f"a stack of {len(self)} matrices has no number {number}.")
        return Operand(self.layer(number % len(self)), self.like, self.shape[1:], self.transposed)

    @property
    def like(self) -> Tensor:
        """An empty tensor of the type of the matrices, where they are."""
        weight: Any = self.layer(0).weight
        return weight.detach().new_empty(0)

    def layer(self, i: int) -> nn.Module:
        """Return the layer that applies a matrix."""
        return self.get_submodule(str(i))

    def size(self, dim: int | None = None) -> Any:
        """Shape, or one of the three sizes."""
        return self.shape if dim is None else self.shape[dim]

    def detached(self) -> Self:
        """Give each layer memory of its own, so that what is replaced is let go."""
        for part in self.children():
            if isinstance(part, Slice):
                part.weight = nn.Parameter(part.weight.detach().clone(), requires_grad=self.requires)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Put an empty tensor under the parameter's name: no checkpoint of a stack can be loaded into it."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.like.is_meta:  # a stack that waits for its values does not wait for that
            destination[prefix.removesuffix(".")] = self.like

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
        if prefix.removesuffix(".") in unexpected_keys:
            unexpected_keys.remove(prefix.removesuffix("."))

    def transpose(self, *dims: int) -> Any:
        """Refuse, as the transpose of all matrices at once is for products that cannot be followed."""
        raise _misused("transpose")

    def parameter(self) -> nn.Parameter | None:
        """Return the 3-D parameter again, or None unless every layer is a :class:`Slice` without a bias."""
        parts = [part for part in self.children() if isinstance(part, Slice) and part.bias is None]
        if len(parts) < len(self):
            return None
        whole = torch.stack([part.weight.detach() for part in parts])
        return nn.Parameter(whole, requires_grad=self.requires)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute the batched product of (e, t, n) and the stack; refuse everything else."""
        match args:
            case (Tensor() as x, Stack() as stack) if func in _BATCHED and stack.transposed and x.dim() == 3:
                stack.batched = True
                return torch.stack([stack.layer(i)(rows) for i, rows in enumerate(x.unbind())])
            case _:
                raise _misused(func)


def kind_of(layer: nn.Module) -> type[nn.Module]:
    """Return the class of a layer; ``fully_shard`` puts one of its own in front of it, which is passed over."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not there where nothing is sharded
    kind = type(layer)
    return kind.__mro__[2] if fsdp is not None and isinstance(layer, fsdp.FSDPModule) else kind


def stacks_of(owner: nn.Module) -> Mapping[str, bool]:
    """Return the stacks of matrices among a module's own parameters, and whether they are stored as (n, m).

    A 3-D parameter alone may be anything, such as tables of positions. It is a stack where the module says how
    its matrices are stored (``is_transposed``, as transformers' experts do), or where another one of as many
    slices takes up its outputs: an (e, 2 k, h) followed by an (e, h, k), behind a gate, is used as
    ``linear(x, W)``, and an (e, h, 2 k) followed by an (e, k, h) as ``x @ W``. Without a gate both are possible,
    and the first is taken. Square ones show nothing (the block-diagonal gates of RecurrentGemma are such), and
    what a structured matrix is made of is no stack.

    >>> import torch
    >>> from torch import nn
    >>> class Experts(nn.Module):
    ...     pass
    >>> experts = Experts()
    >>> experts.up = nn.Parameter(torch.zeros(3, 8, 4))
    >>> experts.down = nn.Parameter(torch.zeros(3, 4, 8))
    >>> stacks_of(experts)
    {'up': False, 'down': False}
    """
    if isinstance(owner, StructuredMatrix) or kind_of(owner).__module__.startswith("torch."):
        return {}
    found = {
        name: parameter.shape
        for name, parameter in owner.named_parameters(recurse=False)
        if parameter.dim() == 3 and parameter.is_floating_point() and min(parameter.shape) > 1
    }
    already = (part.transposed for part in owner.children() if isinstance(part, Stack))
    declared = next(already, getattr(owner, "is_transposed", None))
    if isinstance(declared, bool):
        return dict.fromkeys(found, declared)
    for transposed in (False, True):
        shapes = [(e, b, a) if transposed else (e, a, b) for e, a, b in found.values()]
        if any(_follows(one, other) for i, one in enumerate(shapes) for other in shapes[i + 1 :]):
            return dict.fromkeys(found, transposed)
    return {}


def stack_at(model: nn.Module, path: str) -> tuple[nn.Module, str, bool] | None:
    """Return the module, the parameter and the order of a stack at a dotted path, if there is one."""
    above, _, name = path.rpartition(".")
    try:
        owner = model.get_submodule(above)
    except AttributeError:
        return None
    found = stacks_of(owner)
    return (owner, name, found[name]) if name in found else None


def stacks(model: nn.Module) -> Iterator[tuple[str, Stack]]:
    """Yield the stacks that stand in a model, by every path."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Stack):
            yield path, module


@runtime_checkable
class ChoosesExperts(Protocol):
    """A model that computes its experts in one of several ways, as those of transformers do."""

    def get_experts_implementation(self) -> Any:
        """Return the way."""
        ...

    def set_experts_implementation(self, experts_implementation: Any) -> None:
        """Change it."""
        ...


def one_by_one(model: nn.Module) -> Callable[[], None]:
    """Have a model compute its experts one after the other, as a :class:`Stack` needs; return the way back."""
    if not isinstance(model, ChoosesExperts):
        return lambda: None
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    return lambda: model.set_experts_implementation(before)


_PRODUCTS = (torch.matmul, torch.mm, Tensor.__matmul__, Tensor.matmul, Tensor.mm)
_BATCHED = (torch.matmul, torch.bmm, Tensor.__matmul__, Tensor.matmul, Tensor.bmm)


def _follows(one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    """Whether (e, m, n) matrices can take the outputs of others, gated or not, back to their inputs' size."""
    (e, m, n), (count, out, width) = one, other
    return e == count and out == n and (width == m != n or 2 * width == m)


def _biased(y: Tensor, kwargs: Any) -> Tensor:
    bias = (kwargs or {}).get("bias")
    return y if bias is None else y + bias


def _misused(func: Any) -> ValueError:  # of a TypeError, torch would make one of its own without the text
    name = getattr(func, "__name__", str(func))
    return ValueError(
        f"a stack of matrices is used by {name}, against what its shapes say, or in another way than "
        "linear(x, W[i]), x @ W[i] or bmm(x, W). Compute experts one by one (experts_implementation 'eager'); "
        "for matrices stored as (n, m), give their module an attribute is_transposed = True; or leave them out "
        "with 'where'."
    )
