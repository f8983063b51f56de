"""A key-value cache for many steps of known number, and attention that is fast on it on CPUs."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class _Reserved(DynamicLayer):
    """Keys and values in memory reserved for all steps, so that no step copies the past."""

    def __init__(self, length: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.length, self.storage_dtype, self.filled = length, dtype, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.all_keys, self.all_values = (
            x.new_empty(*x.shape[:-2], self.length, x.shape[-1], dtype=self.storage_dtype or x.dtype)
            for x in (key_states, value_states)
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.filled + key_states.shape[-2]
        self.all_keys[..., self.filled : end, :] = key_states
        self.all_values[..., self.filled : end, :] = value_states
        self.keys, self.values = self.all_keys[..., :end, :], self.all_values[..., :end, :]
        self.filled = end
        return self.keys, self.values


def reserved_cache(model: Any, length: int, dtype: torch.dtype | None = None) -> DynamicCache | None:
    """Return an empty cache for ``length`` tokens, or None if the model makes one of its own kind, as MiniMax.

    Layers that do not keep the whole past are as usual.

    Args:
        model: a causal language model of transformers.
        length: how many tokens it will hold at most.
        dtype: of the stored keys and values; None keeps the model's.
    """
    if not model._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=model.config)
    cache.layers = [_Reserved(length, dtype) if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


class Float32Attention(TorchFunctionMode):
    """Compute attention in float32 while the rest of the model is in a shorter type.

    PyTorch's bfloat16 attention of one query on CPUs takes six times as long as float32's; with keys
    and values kept in float32 nothing but the query is converted.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Convert the query, key and value of ``scaled_dot_product_attention``, and the result back."""
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args
        with torch.autocast(query.device.type, enabled=False):
            return func(query.float(), key.float(), value.float(), **(kwargs or {})).to(query.dtype)
