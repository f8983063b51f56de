"""A checkpoint that stays on disk: its model is built without values, and parts of it are filled when needed."""

import contextlib
import copy
import hashlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..core.files import read_json
from ..core.finite import is_finite
from ..core.tensor_file import read_tensor
from .load import config_from, find, without_values
from .model_folder import weight_files
from .places import places_of, unread_words
from .quiet import quiet

Wanted = Callable[[str], bool]


class Checkpoint:
    """A folder of safetensors and its model, whose tensors are on the meta device until they are filled.

    Args:
        source: what :func:`rankwise.load` takes, but no GGUF file.
        dtype: of the weights; None keeps those of the checkpoint.

    Raises:
        ValueError: if there is no such model, its files are damaged, or it is quantised or compressed already.
    """

    def __init__(self, source: str | Path, dtype: torch.dtype | None = None) -> None:
        self.folder = find(source, trust=False)
        if self.folder.is_file():
            raise ValueError(f"{source} is one GGUF file, which cannot be streamed; convert it to safetensors.")
        self.files = weight_files(self.folder)
        file = self.folder / "config.json"
        try:
            self.config = config_from(read_json(file))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        if found := getattr(self.config, "quantization_config", None):
            raise ValueError(f"{source} is compressed by {found.get('quant_method')} already; give the original.")
        self.dtype = dtype or self._dtype()
        self.model: Any = without_values(copy.deepcopy(self.config), self.dtype)
        empty(self.model)  # some modules give their parameters values in spite of the device
        self.model.eval().requires_grad_(False)
        self.loading: Any = self._loading()
        self.places = places_of(self.model, self.files)

    def identity(self) -> dict[str, Any]:
        """Return what tells this checkpoint from others: of each file the size, date and hash of the header."""
        config = (self.folder / "config.json").read_bytes()
        found: dict[str, Any] = {"config.json": hashlib.blake2b(config, digest_size=16).hexdigest()}
        for file in sorted(set(self.files.values())):
            about = file.stat()
            with file.open("rb") as opened:
                header = opened.read(8 + int.from_bytes(opened.read(8), "little"))
            digest = hashlib.blake2b(header, digest_size=16).hexdigest()
            found[file.name] = [about.st_size, about.st_mtime_ns, digest]
        return found

    def fill_all_but(self, part: str) -> None:
        """Fill everything that is not under a path, buffers that are in no file included.

        Raises:
            ValueError: if a tensor is missing, damaged or not finite.
        """
        inside = _under(part)
        with quiet():
            found = self._fill(lambda name: not inside(name))
            found.missing_keys = {name for name in found.missing_keys if not inside(name)}
            found.unexpected_keys = set(self.places.values()) - self.model.state_dict().keys()
            found = self.model._finalize_model_loading(self.model, self.loading, found)
        self._check(found, lambda name: not inside(name))
        if unread := list(found.unexpected_keys):
            warnings.warn(unread_words(self.folder, unread), stacklevel=2)
        self.model.eval().requires_grad_(False)

    @contextlib.contextmanager
    def filled(self, part: str) -> Iterator[nn.Module]:
        """Fill the module at a path, and empty it again, also what was replaced in it meanwhile.

        Raises:
            ValueError: if a tensor is missing, damaged or not finite.
        """
        module = self.model.get_submodule(part)
        before = list(module.modules())
        try:
            self._check(self._fill(_under(part)), _under(part))
            yield module.requires_grad_(False)
        finally:
            for each in (module, *before):
                empty(each)

    def _dtype(self) -> torch.dtype:
        """The type of the weights as transformers sees it: what the config says, else the first tensor's."""
        if isinstance(self.config.dtype, torch.dtype):
            return self.config.dtype
        for key, file in self.files.items():
            with safe_open(file, framework="pt") as opened:
                dtype = opened.get_slice(key)[..., :0].dtype
            if dtype.is_floating_point:
                return dtype
        raise ValueError(f"{self.folder} holds no floating-point tensor.")

    def _loading(self) -> Any:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.modeling_utils import LoadStateDictConfig

        rules: Any = get_model_conversion_mapping(self.model)
        return LoadStateDictConfig(
            pretrained_model_name_or_path=str(self.folder),
            ignore_mismatched_sizes=True,  # they are an error below, with their names
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            weight_mapping=rules,
        )

    def _fill(self, wanted: Wanted) -> Any:
        """Load the tensors whose places are wanted; return what transformers found missing or of a wrong size."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        tensors = {key: self._read(key) for key, place in self.places.items() if wanted(place)}
        with quiet(), _without_bars():
            return convert_and_load_state_dict_in_model(self.model, tensors, self.loading)[0]

    def _read(self, key: str) -> Tensor:
        file = self.files[key]
        try:
            tensor = read_tensor(file, key)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{key} cannot be read from {file} ({error}); get the file again.") from error
        if not is_finite(tensor):
            raise ValueError(f"{key} in {file} holds NaN or infinity; get a sound checkpoint.")
        return tensor

    def _check(self, found: Any, wanted: Wanted) -> None:
        for name, stored, own in sorted(found.mismatched_keys):
            raise ValueError(f"{name} is {tuple(stored)} in the checkpoint, but {tuple(own)} in the model.")
        for name, error in sorted(found.conversion_errors.items()):
            raise ValueError(f"{name} cannot be made of the tensors in {self.folder}: {error}")
        missing = sorted(name for name in found.missing_keys if wanted(name))
        if missing:
            raise ValueError(f"{missing[0]} is not in {self.folder}, as {len(missing)} of these tensors in all.")


def empty(module: nn.Module) -> None:
    """Let go of the values that a checkpoint would fill; shapes and types stay."""
    for path, tensor in module.state_dict(keep_vars=True).items():
        if tensor.is_meta:
            continue
        parent, _, name = path.rpartition(".")
        owner, bare = module.get_submodule(parent), tensor.detach().to("meta")
        if isinstance(getattr(owner, name), nn.Module):
            continue  # the empty tensor that stands for a stack, which goes by its matrices
        setattr(
            owner, name, nn.Parameter(bare, requires_grad=False) if isinstance(tensor, nn.Parameter) else bare
        )


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers from showing a progress bar for each part."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    try:
        logging.disable_progress_bar()
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _under(part: str) -> Wanted:
    return lambda name: name.startswith(f"{part}.")
