"""Files that llama.cpp opens."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.finite import is_finite
from ..core.progress import track
from ..matrices import LowRank, PivotedLowRank, Quantized, StructuredMatrix, Sum
from ..models.folded import Folded
from ..models.load import config_from, tokenizer_of
from .base import Exporter, Source
from .ggml_architecture import Architecture, add_sizes, architecture_of, frequency_divisors, row_order
from .ggml_blocks import FLOATS, Stored, low_bit, plain
from .ggml_tokenizer import add_tokenizer

Tensors = Mapping[str, Callable[[], Stored]]


@dataclass(frozen=True, kw_only=True)
class Gguf(Exporter):
    """A file ``model.gguf`` for llama.cpp: a Llama, Mistral, Qwen2 or Qwen3 with a byte-level BPE tokenizer.

    Matrices are written out, except low-bit ones that one of GGUF's own types holds exactly. Only one matrix is
    in memory at a time.

    Args:
        dtype: of the matrices that are written out. Vectors are always f32.
        low_bit: whether low-bit matrices of at most 5 bits keep their integers (Q4_1, Q5_1) where that is exact:
            whole groups of 32 columns, scales and offsets that float16 holds.
        adapter: whether the low-rank terms of sums become ``adapter.gguf``, a LoRA adapter for ``model.gguf``,
            instead of being added to it. Its alpha is 0, by which llama.cpp applies it as it is.
    """

    dtype: Literal["f16", "bf16", "f32"] = "f16"
    low_bit: bool = True
    adapter: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in FLOATS:
            raise ValueError(f"dtype must be one of {', '.join(FLOATS)}, got {self.dtype!r}.")

    def write(self, source: Source, out: Path) -> None:
        """Write the model and, if asked for, the adapter.

        Raises:
            ValueError: if llama.cpp has no such architecture or tokenizer, or there is nothing for an adapter.
        """
        import gguf

        folder = source.folder()
        weights = Folded(folder)
        config = config_from(weights.config)
        architecture = architecture_of(config)
        tensors, low_rank = self._tensors(weights, config, architecture)
        if self.adapter and not low_rank:
            raise ValueError("no matrix is a sum with a low-rank term, so there is nothing for an adapter.")
        writer = gguf.GGUFWriter(out / "model.gguf", architecture.name)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_sizes(writer, config)
        add_tokenizer(writer, tokenizer_of(folder), config.vocab_size)
        _write(writer, tensors, out / "model.gguf")
        if low_rank:
            writer = gguf.GGUFWriter(out / "adapter.gguf", architecture.name)
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
            _write(writer, low_rank, out / "adapter.gguf")

    def _tensors(self, weights: Folded, config: Any, architecture: Architecture) -> tuple[Tensors, Tensors]:
        """Return what makes each tensor of the model and of the adapter, by its name in GGUF."""
        import gguf

        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
        names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
        tensors: dict[str, Callable[[], Stored]] = {}
        low_rank: dict[str, Callable[[], Stored]] = {}
        for name in weights:
            known = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if known is None:
                raise ValueError(f"tensor {name} has no place in a {architecture.name} of GGUF.")
            if name.endswith(".bias") and name.split(".")[-2] not in architecture.biased:
                raise ValueError(
                    f"llama.cpp reads no {name} in a {architecture.name}, and would not open the file; export to "
                    "onnx, or compress with a method that adds no bias."
                )
            tensors[known] = lambda name=name: self._stored(weights, config, name)
            if self.adapter and _apart(weights, name) is not None:
                low_rank[f"{known}.lora_a"] = lambda name=name: self._factors(weights, config, name)[0]
                low_rank[f"{known}.lora_b"] = lambda name=name: self._factors(weights, config, name)[1]
        divisors = frequency_divisors(config)
        if divisors is not None:
            tensors["rope_freqs.weight"] = lambda: plain(divisors, "f32")
        return tensors, low_rank

    def _stored(self, weights: Folded, config: Any, name: str) -> Stored:
        """Return a tensor of the model as it stands in the file."""
        rows = row_order(config, name)
        matrix = _matrix(weights, name)
        if self.adapter and (apart := _apart(weights, name)) is not None:
            matrix = apart[0]
        if self.low_bit and isinstance(matrix, Quantized) and (exact := low_bit(matrix, rows)) is not None:
            return exact
        tensor = weights[name] if matrix is None else matrix.float().dense().detach()
        return _plain(name, tensor if rows is None else tensor[rows], "f32" if tensor.dim() == 1 else self.dtype)

    def _factors(self, weights: Folded, config: Any, name: str) -> tuple[Stored, Stored]:
        """Return the (r, n) and the (m, r) factor of the low-rank terms of a matrix."""
        rows, apart = row_order(config, name), _apart(weights, name)
        assert apart is not None
        lefts, rights = zip(*(term.factors() for term in apart[1]), strict=True)
        left, right = torch.cat(lefts, 1).detach(), torch.cat(rights).detach()
        return _plain(name, right, self.dtype), _plain(name, left if rows is None else left[rows], self.dtype)


def _plain(name: str, tensor: Tensor, kind: str) -> Stored:
    if not is_finite(tensor):
        raise ValueError(f"{name} holds NaN or infinity; mend the source.")
    try:
        return plain(tensor, kind)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _matrix(weights: Folded, name: str) -> StructuredMatrix | None:
    layer = name.removesuffix(".weight")
    return weights.matrix(layer) if layer in weights.layers and layer != name else None


def _apart(weights: Folded, name: str) -> tuple[StructuredMatrix, list[LowRank | PivotedLowRank]] | None:
    """Return a sum without its low-rank terms, and these; None if it is no such sum."""
    matrix = _matrix(weights, name)
    if not isinstance(matrix, Sum):
        return None
    low = [term for term in matrix.parts if isinstance(term, LowRank | PivotedLowRank)]
    rest = [term for term in matrix.parts if not isinstance(term, LowRank | PivotedLowRank)]
    return (rest[0] if len(rest) == 1 else Sum(*rest), low) if low and rest else None


def _write(writer: Any, tensors: Tensors, path: Path) -> None:
    """Write a file, one tensor at a time, and read it back.

    Each tensor is made twice: once for the table of shapes and types that stands in front, once to be written.
    """
    import gguf

    for name, make in tensors.items():
        stored = make()
        kind = gguf.GGMLQuantizationType[stored.kind]
        writer.add_tensor_info(name, stored.data.shape, stored.data.dtype, stored.data.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    digests = {}
    for name, make in track(tensors.items(), path.name):
        data = make().data
        writer.write_tensor_data(data)
        digests[name] = _digest(data)
    writer.close()
    found = {tensor.name: _digest(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    wrong = sorted(digests.items() ^ found.items())
    if wrong:
        raise ValueError(f"{wrong[0][0]} in {path} does not read back as it was written; is the disk sound?")


def _digest(data: Any) -> bytes:
    import numpy as np

    return hashlib.blake2b(np.ascontiguousarray(data).view(np.uint8).data).digest()
