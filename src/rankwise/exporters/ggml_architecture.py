"""Decoders that llama.cpp knows: their names there, their sizes, and the order of their rows."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Architecture:
    """A kind of decoder.

    Args:
        name: in GGUF.
        biased: the layers of which llama.cpp reads a bias.
        pairs: whether rotary embeddings turn neighbouring rows of queries and keys, not rows half a head apart
            as in transformers; the rows are then stored in another order.
        square: whether the heads together must be as wide as the hidden state.
    """

    name: str
    biased: frozenset[str]
    pairs: bool
    square: bool = False


_QKV = frozenset({"q_proj", "k_proj", "v_proj"})
_LLAMA = Architecture("llama", _QKV | {"o_proj", "gate_proj", "up_proj", "down_proj"}, pairs=True)
KNOWN = {  # transformers' model_type
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2", _QKV, pairs=False, square=True),
    "qwen3": Architecture("qwen3", frozenset(), pairs=False),
}


def architecture_of(config: Any) -> Architecture:
    """Return what llama.cpp calls a model.

    Raises:
        ValueError: if it is of another kind, or has a feature that is not written to GGUF.
    """
    known = KNOWN.get(config.model_type)
    if known is None:
        raise ValueError(f"a {config.model_type} cannot be written to GGUF; known are {', '.join(KNOWN)}.")
    if config.hidden_act != "silu":
        raise ValueError(f"llama.cpp computes silu in this kind of model, not {config.hidden_act}.")
    if known.square and head_size(config) * config.num_attention_heads != config.hidden_size:
        raise ValueError(
            f"llama.cpp reads a {config.model_type} only if its {config.num_attention_heads} heads of "
            f"{head_size(config)} make the hidden size, {config.hidden_size}; narrow its MLPs alone."
        )
    rope = config.rope_parameters
    kinds = ("default", "linear", "llama3") if known.name == "llama" else ("default", "linear")
    if rope["rope_type"] not in kinds or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"rotary embeddings of {rope} are not written to GGUF; known are {', '.join(kinds)}.")
    return known


def add_sizes(writer: Any, config: Any) -> None:
    """Add the hyperparameters of a model to a ``gguf.GGUFWriter``."""
    import gguf

    heads, rope = config.num_attention_heads, config.rope_parameters
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_size(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def head_size(config: Any) -> int:
    """Return how many rows of queries a head has."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def frequency_divisors(config: Any) -> Tensor | None:
    """Return what llama.cpp divides the rotary frequencies by, (head size / 2), or None if by nothing."""
    if config.rope_parameters["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    size = head_size(config)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2) / size) / scaled


def row_order(config: Any, name: str) -> Tensor | None:
    """Return the order in which the rows of a weight or bias are stored, or None if it is their own.

    >>> import types
    >>> heads = {"head_dim": 4, "num_attention_heads": 2, "num_key_value_heads": 1}
    >>> config = types.SimpleNamespace(model_type="llama", **heads)
    >>> row_order(config, "model.layers.0.self_attn.q_proj.weight").tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None or not KNOWN[config.model_type].pairs:
        return None
    half = head_size(config) // 2
    return torch.arange(2 * heads * half).view(heads, 2, half).mT.flatten()


def _context(config: Any) -> int:
    """Return how many tokens the file promises: no more than the attention window, which llama.cpp leaves out."""
    window = getattr(config, "sliding_window", None)
    sliding = window is not None and getattr(config, "use_sliding_window", True)
    return min(config.max_position_embeddings, window) if sliding else config.max_position_embeddings
