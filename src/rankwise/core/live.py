"""How many bytes a forward and backward pass holds at its worst moment, counted, also without any numbers."""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the memory of tensors that are made inside, as long as they live.

    What kernels take for a moment inside themselves is not seen. Tensors on the meta device take nothing.

    Args:
        own: tensors that were there before and do not count.

    >>> with LiveBytes([]) as live:
    ...     kept = torch.ones(10) + torch.ones(10)
    >>> live.now, live.peak
    (40, 120)
    """

    def __init__(self, own: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._own = own  # alive, so that no other storage gets their places
        self._known = {_storage(tensor)._cdata for tensor in own}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._note(_storage(leaf))
        return made

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def pass_bytes(model: nn.Module, loss: Callable[[], Tensor], *, layerwise: bool = False) -> int:
    """Count the most that a forward and backward pass holds at once beside the model.

    Activations, gradients and what stands between them, each as long as it lives. The model and the inputs of the
    loss may be fake (:func:`without_numbers`); gradients are gone afterwards.

    Args:
        model: in the mode in which it trains.
        loss: computes what is lowered.
        layerwise: gradients are freed as soon as they are complete.
    """
    own = [*model.parameters(), *model.buffers()]
    hooks = [p.register_post_accumulate_grad_hook(_free) for p in own if layerwise and p.requires_grad]
    try:
        with LiveBytes(own) as live, torch.enable_grad():
            loss().backward()
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad()
    return live.peak


def without_numbers() -> AbstractContextManager[Any]:
    """Let tensors that are made inside have shapes, types and devices, but no values and no memory.

    What is returned may be entered again, to go on with the same tensors.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Numberless(FakeTensorMode):
        """Knows of products of groups of rows in every type, where torch does in bfloat16 alone."""

        def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if str(func) == "aten._grouped_mm.default":  # which older versions of torch lack
                return _grouped_product(*args, **(kwargs or {}))
            return super().dispatch(func, types, args, kwargs)

    return Numberless()


def _grouped_product(a: Tensor, b: Tensor, offs: Tensor | None = None, **_: Any) -> Tensor:
    """Make what torch's grouped product makes, unset: its groups are of rows, columns, or what is summed."""
    groups = () if a.dim() != b.dim() else (len(a if offs is None else offs),)
    return a.new_empty(*groups, a.shape[-2], b.shape[-1])


def _free(parameter: Tensor) -> None:
    parameter.grad = None


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()
