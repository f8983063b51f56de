"""The project's own files of adapters: everything of an adapter but the matrices that it changes."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.adapted import in_use, own_tensors, whole_parameters
from ..core.files import write_text
from ..core.fingerprint import values_digest
from ..core.surgery import base_of
from ..core.views import View
from ..matrices import Base, StructuredMatrix, from_spec
from ..matrices.frozen import put_base
from .adapter_folder import NONE, AdapterFolder, check_shape
from .model_files import verify

NAME = "rankwise_adapter.json"
TENSORS = "rankwise_adapter.safetensors"
VERSION = 1


def write_adapter(model: nn.Module, folder: Path) -> None:
    """Fill a folder with the adapters of a model, and with its parameters that train whole.

    Raises:
        ValueError: if there is no adapter, or what was written does not read back the same.
    """
    from .. import __version__

    layers, tensors, first, shared, turned = [], {}, {}, {}, {}
    for names, matrix in groups(model):
        base = base_of(matrix)
        assert base is not None
        spec = _mapped(matrix.spec(), _without_matrix)
        about = {"shape": list(base.shape), "digest": base_digest(base.matrix)}
        layers.append({"names": names, "spec": spec, "base": about})
        usual = own_tensors(_empty(spec, base.matrix.spec()))
        for key, tensor in own_tensors(matrix).items():
            name = f"{names[0]}.matrix.{key}"
            owner = first.setdefault(_memory(tensor), name)
            if owner != name:
                shared[name] = owner
            else:
                tensors[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
            if tensor.requires_grad != usual[key].requires_grad:
                turned[name] = tensor.requires_grad
    if not layers:
        raise ValueError(NONE)
    whole = {name: parameter.detach().contiguous() for name, parameter in whole_parameters(model).items()}
    content = {
        "version": VERSION,
        "rankwise_version": __version__,
        "layers": layers,
        "whole": sorted(whole),
        "shared": shared,
        "turned": turned,
    }
    folder.mkdir(exist_ok=True)
    save_file(tensors | whole, folder / TENSORS, metadata={"format": "pt"})
    verify(tensors | whole, folder)
    write_text(folder / NAME, json.dumps(content, indent=1) + "\n")


class OwnFolder(AdapterFolder):
    """A folder of :func:`write_adapter`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / NAME, folder / TENSORS)
        if self.config.get("version") != VERSION:
            found = self.config.get("version")
            raise ValueError(f"{folder / NAME} has version {found!r}; this rankwise reads {VERSION}.")
        self._entries = {entry["names"][0]: entry for entry in _entries(folder / NAME, self.config)}
        self._shared: Mapping[str, str] = self.config.get("shared", {})
        self._turned: Mapping[str, bool] = self.config.get("turned", {})
        self._made: dict[str, Tensor] = {}  # so that what was one tensor is one again

    @property
    def layers(self) -> list[str]:
        """The first name of each."""
        return list(self._entries)

    def wanted(self, names: Iterable[str], head: str | None) -> list[str]:
        """All that are there."""
        return self.layers

    @property
    def whole(self) -> Mapping[str, str]:
        """What was trained whole; it has the same names in the file."""
        return {name: name for name in self.config.get("whole", [])}

    def matrix(self, name: str, base: StructuredMatrix, view: View) -> StructuredMatrix | None:
        """Build the expression, and fill it."""
        entry = self._entries[name]
        if list(base.shape) != entry["base"]["shape"]:
            raise ValueError(
                f"layer {name} is {tuple(base.shape)} in the model, but {tuple(entry['base']['shape'])} in "
                f"{self.folder}; it belongs to another model."
            )
        if base_digest(base) != entry["base"]["digest"]:
            self.others.append(name)
        try:
            matrix = _empty(entry["spec"], base.spec())
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"layer {name} in {self.folder / NAME}: {error}") from error
        if matrix.shape != base.shape or base_of(matrix) is None:
            raise ValueError(f"layer {name} in {self.folder / NAME} is no adapter of a {base.shape} matrix.")
        found = {
            key: self._tensor(f"{name}.matrix.{key}", like, base) for key, like in own_tensors(matrix).items()
        }
        if any(value is None for value in found.values()):
            return None
        for key, value in found.items():
            _put(matrix, key, value)
        _check(name, matrix)
        put_base(matrix, base)
        return matrix

    def _tensor(self, name: str, like: Tensor, base: StructuredMatrix) -> Tensor | None:
        """Return a tensor of the file as the parameter or buffer that it was, or None if it is missing."""
        owner = self._shared.get(name, name)
        stored = self.take(owner)
        if stored is None:
            return None
        check_shape(owner, stored, like.shape)
        if stored.is_floating_point() != like.is_floating_point():
            raise ValueError(f"{owner} is stored as {stored.dtype}; the file is damaged.")
        stored = stored.to(base.device)
        made = nn.Parameter(stored, like.requires_grad) if isinstance(like, nn.Parameter) else stored
        return self._made.setdefault(owner, made).requires_grad_(self._turned.get(name, like.requires_grad))


def groups(model: nn.Module) -> Iterator[tuple[list[str], StructuredMatrix]]:
    """Yield the adapted matrices in use, each with the names of all layers that hold it."""
    found: dict[int, tuple[list[str], StructuredMatrix]] = {}
    for name, matrix in in_use(model).items():
        found.setdefault(id(matrix), ([], matrix))[0].append(name)
    yield from found.values()


def base_digest(matrix: StructuredMatrix) -> str:
    """Return a hash of what a matrix stores, the same in all types that hold its values exactly."""
    return values_digest(matrix.state_dict())


def _entries(file: Path, content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    layers = content.get("layers")
    for entry in layers if isinstance(layers, list) else [None]:
        match entry:
            case {"names": [str(), *_], "spec": {}, "base": {"shape": [int(), int()], "digest": str()}}:
                yield entry
            case _:
                raise ValueError(f"{file} holds a damaged entry {str(entry)[:80]!r} of a layer; get it again.")


def _mapped(spec: Any, change: Callable[[Mapping[str, Any]], Any]) -> Any:
    """Return a spec with each base in it replaced."""
    if isinstance(spec, Mapping):
        if spec.get("kind") == Base.__name__:
            return change(spec)
        return {key: _mapped(value, change) for key, value in spec.items()}
    return [_mapped(value, change) for value in spec] if isinstance(spec, list) else spec


def _without_matrix(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": spec["kind"]}


def _empty(spec: Any, base: Any) -> StructuredMatrix:
    """Make the matrix of a spec without values, around the spec of a base."""
    return from_spec(_mapped(spec, lambda old: {"kind": old["kind"], "matrix": base}), device="meta")


def _memory(tensor: Tensor) -> Any:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _put(matrix: StructuredMatrix, key: str, value: Any) -> None:
    path, _, name = key.rpartition(".")
    owner = matrix.get_submodule(path)
    (owner._parameters if isinstance(value, nn.Parameter) else owner._buffers)[name] = value


def _check(name: str, matrix: StructuredMatrix) -> None:
    for path, part in matrix.named_modules():
        if isinstance(part, StructuredMatrix) and not any(t.is_meta for t in part.state_dict().values()):
            try:
                part.check()
            except ValueError as error:
                raise ValueError(f"{f'{name}.matrix.{path}'.rstrip('.')}: {error}") from error
