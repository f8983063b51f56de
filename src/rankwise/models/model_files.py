"""Write whole models so that plain transformers loads them again."""

import copy
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..core.adapted import adapted
from ..core.bits import bits
from ..core.files import new_folder, share, sync, write_text
from ..core.stacks import stacks
from ..core.surgery import StructuredLinear, structured
from ..matrices.base import Place, shared_parts
from .model_folder import INDEX, files_beside
from .quantizer import FORMAT, METHOD, describe, path_of
from .quiet import quiet


def save_model(model: nn.Module, folder: Path, tokenizer: Any = None) -> None:
    """Write a model that plain transformers loads again, and read it back before it gets its name.

    The folder holds safetensors, ``config.json`` with the specs of the structured matrices under
    ``quantization_config``, and the tokenizer. After ``import rankwise``,
    ``AutoModelForCausalLM.from_pretrained(folder)`` loads it; without the import it fails, because under the
    name of each replaced weight stands an empty tensor.

    Tensors that transformers ties, and matrices that layers share, are written once and shared again when
    loaded. Other tensors that stand in several places are written as often.

    Raises:
        TypeError: if the model is not one of transformers.
        ValueError: if it has adapters, the folder holds something already, or what was written does not read back
            the same.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be one of transformers, got {type(model).__name__}; of other modules save the "
            "state_dict and the matrix.spec() of each StructuredLinear."
        )
    if layer := next(iter(adapted(model)), None):
        raise ValueError(
            f"layer {layer} has an adapter; put it into the weights first with rankwise.fold or absorb, or write "
            "the adapter alone with format='rankwise' or format='peft'."
        )
    for name, layer in model.named_modules():
        if getattr(layer, "biased", False) and not isinstance(layer, StructuredLinear):
            raise ValueError(
                f"layer {name} got a bias from compression, for which {type(model).__name__} has no place; "
                "save the model before it is folded."
            )
    own = model.config
    try:
        with new_folder(folder) as temporary:
            model.config = with_specs(model.config, describe(model))
            tensors = tensors_of(model)
            with quiet():
                model.save_pretrained(temporary, state_dict=dict(tensors), save_original_format=False)
                if tokenizer is not None:
                    tokenizer.save_pretrained(temporary)
            verify(tensors, temporary)
    finally:
        model.config = own


def assemble(config: Any, shards: Sequence[Path], source: Path, work: Path, folder: Path) -> None:
    """Make a folder as :func:`save_model` does, of shards that are written and verified already.

    Args:
        config: of the compressed model, from :func:`with_specs`.
        shards: safetensors files, which stay where they are.
        source: folder whose tokenizer and other small files are copied.
        work: an existing folder on the same disk as ``folder``.
        folder: a new or empty one; it appears when it is complete.
    """
    temporary = work / f".{folder.name}.{os.getpid()}.tmp"
    temporary.mkdir()
    try:
        config.save_pretrained(temporary)
        places, sizes = {}, 0
        for i, shard in enumerate(shards):
            file = temporary / f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            _link(shard, file)
            with safe_open(file, framework="pt") as opened:
                names = opened.keys()
                places |= dict.fromkeys(names, file.name)
                sizes += sum(opened.get_tensor(name).nbytes for name in names)
        index = {"metadata": {"total_size": sizes}, "weight_map": dict(sorted(places.items()))}
        write_text(temporary / INDEX, json.dumps(index, indent=2) + "\n")
        for file in files_beside(source):
            shutil.copyfile(file, temporary / file.name)
        share(temporary)
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _link(file: Path, other: Path) -> None:
    """Give a file a second name, or copy it where that is not possible."""
    try:
        os.link(file, other)
    except OSError:
        shutil.copyfile(file, other)
        sync(other)


def predicted_bytes(model: nn.Module) -> int:
    """Predict the size of the safetensors file that :func:`save_model` writes, header included.

    >>> from torch import nn
    >>> predicted_bytes(nn.Linear(2, 2))
    184
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    ordered = sorted(  # as safetensors lays them out
        tensors_of(model).items(),
        key=lambda item: (-item[1].element_size(), not item[1].is_floating_point(), item[0]),
    )
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        kind = "BF16" if tensor.dtype == torch.bfloat16 else "F32"  # most names have three letters
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + -(-length // 8) * 8 + end


def forget(model: nn.Module) -> None:
    """Remove the specs of structured matrices from the config of a model that has been folded."""
    config: Any = getattr(model, "config", None)
    if _method(config) == METHOD:
        del config.quantization_config


def _method(config: Any) -> str | None:
    """Return the name of the quantisation method that a config holds, if any."""
    found = getattr(config, "quantization_config", None)
    return found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)


def with_specs(own: Any, groups: Sequence[Any]) -> Any:
    """Return a copy of a model's config with the specs of its structured matrices, or without old ones."""
    from .. import __version__

    config, method = copy.deepcopy(own), _method(own)
    if groups and method not in (None, METHOD):
        raise ValueError(f"the model is quantised by {method}; structured layers cannot be saved beside that.")
    if method == METHOD:
        del config.quantization_config
    if groups:
        written = {"quant_method": METHOD, "version": FORMAT, "rankwise_version": __version__, "matrices": groups}
        config.quantization_config = written
    return config


def tensors_of(model: Any) -> dict[str, Tensor]:
    """Return what the file of a model holds: all tensors by the names that they have in it.

    The matrices of a stack stand under the model's own names, which no rule of transformers rewrites, and an
    empty tensor stands in place of the 3-D parameter.
    """
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    state = dict(model.state_dict())
    known: dict[int, Place] = {}
    found = {name: shared_parts(layer.matrix, name, known) for name, layer in structured(model).items()}
    elsewhere = tuple(f"{path_of(name, part)}." for name, parts in found.items() for part, _, _ in parts)
    state = {key: tensor for key, tensor in state.items() if not key.startswith(elsewhere)}
    if isinstance(model, PreTrainedModel):
        for name, source in model.all_tied_weights_keys.items():
            if name in state and source in state and _place(state[name]) == _place(state[source]):
                del state[name]
        for name in model._keys_to_ignore_on_save or ():
            state.pop(name, None)
        paths = [path for path, _ in stacks(model)]
        inside = tuple(f"{path}." for path in paths)
        own = {name: tensor for name, tensor in state.items() if name in paths or name.startswith(inside)}
        state = revert_weight_conversion(model, {k: t for k, t in state.items() if k not in own}) | own
    return _apart(state)


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors under a second name, and those not stored row by row: safetensors allows neither."""
    seen: set[Any] = set()
    apart = {}
    for name, tensor in state.items():
        place = _place(tensor)
        apart[name] = (tensor.clone() if tensor.numel() and place in seen else tensor).contiguous()
        seen.add(place)
    return apart


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape


def verify(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Raise unless the files of a folder hold these tensors, bit by bit, and no others."""
    found = set()
    for file in sorted(folder.glob("*.safetensors")):
        found |= read_back(file, tensors)
    missing = sorted(tensors.keys() - found)
    if missing:
        raise ValueError(f"{missing[0]} was not written to {folder}, as {len(missing)} in all; is the disk full?")


def read_back(file: Path, tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the names in a file of safetensors; raise unless it holds them as ``tensors`` does, bit by bit."""
    with safe_open(file, framework="pt") as opened:
        names = set(opened.keys())
        for name in names:
            if name not in tensors or not _same(opened.get_tensor(name), tensors[name]):
                raise ValueError(f"{name} in {file} does not read back as it was written; is the disk sound?")
    return names


def _same(written: Tensor, own: Tensor) -> bool:
    if written.dtype != own.dtype or written.shape != own.shape:
        return False
    return torch.equal(bits(written), bits(own))
