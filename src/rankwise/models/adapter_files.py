"""The project's own files of adapters: everything of an adapter but the matrices that it changes."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.adapted import in_use, own_tensors, rate_of, whole_parameters
from ..core.bottleneck import Bottleneck
from ..core.extended import Extended, extended, name_without
from ..core.files import write_text
from ..core.surgery import Site, base_of, select, structured
from ..core.views import View
from ..matrices import Base, StructuredMatrix, from_spec
from ..matrices.base import check_parts
from ..matrices.frozen import put_base
from .adapter_folder import NONE, AdapterFolder, check_shape
from .bases import is_record, record_of
from .model_files import verify

NAME = "rankwise_adapter.json"
TENSORS = "rankwise_adapter.safetensors"
VERSION = 1
MODULES = {"Bottleneck": Bottleneck}  # that may stand behind layers


def write_adapter(model: nn.Module, folder: Path) -> None:
    """Fill a folder with the adapters of a model, and with its parameters that train whole.

    Raises:
        ValueError: if there is no adapter, or what was written does not read back the same.
    """
    from .. import __version__

    layers, modules, file, plain = [], [], _Tensors(), name_without(model)
    for names, matrix in groups(model):
        base = base_of(matrix)
        assert base is not None
        spec = _mapped(matrix.spec(), _without_matrix)
        usual = own_tensors(_empty(spec, base.matrix.spec()))
        file.add(f"{plain(names[0])}.matrix", own_tensors(matrix), usual)
        about = {"base": record_of(matrix), "lr": rate_of(structured(model)[names[0]])}
        layers.append({"names": [plain(name) for name in names], "spec": spec, **about})
    for names, module, matrix in _behind(model):
        if not isinstance(module, tuple(MODULES.values())):
            raise ValueError(f"layer {names[0]}: no file holds the {type(module).__name__} behind it.")
        usual = module.empty(module.spec(), device="meta").state_dict(keep_vars=True)
        file.add(f"{names[0]}.after", module.state_dict(keep_vars=True), usual)
        about = {"base": record_of(matrix), "lr": extended(model)[names[0]].lr}
        modules.append({"names": names, "spec": module.spec(), **about})
    if not layers and not modules:
        raise ValueError(NONE)
    whole = {name: parameter.detach().contiguous() for name, parameter in whole_parameters(model).items()}
    content = {
        "version": VERSION,
        "rankwise_version": __version__,
        "layers": layers,
        "modules": modules,
        "whole": sorted(whole),
        "shared": file.shared,
        "turned": file.turned,
    }
    folder.mkdir(exist_ok=True)
    save_file(file.tensors | whole, folder / TENSORS, metadata={"format": "pt"})
    verify(file.tensors | whole, folder)
    write_text(folder / NAME, json.dumps(content, indent=1) + "\n")


@dataclass(frozen=True)
class _Tensors:
    """What goes into a file.

    Args:
        tensors: by name, each once.
        shared: other names, and the name that the same tensor has in the file.
        turned: whether a tensor trains, where that is not as usual.
        owners: the names of tensors by where they are in memory.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    turned: dict[str, bool] = field(default_factory=dict)
    owners: dict[Any, str] = field(default_factory=dict)

    def add(self, prefix: str, found: Mapping[str, Tensor], usual: Mapping[str, Tensor]) -> None:
        """Take the tensors of one layer, and those that a new one would have."""
        for key, tensor in found.items():
            name = f"{prefix}.{key}"
            owner = self.owners.setdefault(_memory(tensor), name)
            if owner != name:
                self.shared[name] = owner
            else:
                self.tensors[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
            if tensor.requires_grad != usual[key].requires_grad:
                self.turned[name] = tensor.requires_grad


class OwnFolder(AdapterFolder):
    """A folder of :func:`write_adapter`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / NAME, folder / TENSORS)
        if self.config.get("version") != VERSION:
            found = self.config.get("version")
            raise ValueError(f"{folder / NAME} has version {found!r}; this rankwise reads {VERSION}.")
        self._entries, self._modules = (
            {entry["names"][0]: entry for entry in _entries(folder / NAME, self.config.get(key, usual))}
            for key, usual in (("layers", None), ("modules", []))
        )
        self._whole: list[str] = _field(folder / NAME, self.config, "whole", list, str)
        self._shared: Mapping[str, str] = _field(folder / NAME, self.config, "shared", dict, str)
        self._turned: Mapping[str, bool] = _field(folder / NAME, self.config, "turned", dict, bool)
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
        return {name: name for name in self._whole}

    def matrix(self, name: str, base: StructuredMatrix, view: View) -> StructuredMatrix | None:
        """Build the expression, and fill it."""
        entry = self._entries[name]
        self.check_base(name, base, entry["base"])
        try:
            matrix = _empty(entry["spec"], base.spec())
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"layer {name} in {self.folder / NAME}: {error}") from error
        if matrix.shape != base.shape or base_of(matrix) is None:
            raise ValueError(f"layer {name} in {self.folder / NAME} is no adapter of a {base.shape} matrix.")
        if not self._fill(matrix, f"{name}.matrix", own_tensors(matrix), base.device):
            return None
        put_base(matrix, base)
        return matrix

    def rate(self, name: str) -> float | None:
        """What the file says."""
        lr = (self._entries.get(name) or self._modules.get(name) or {}).get("lr")
        return None if lr is None else float(lr)

    @property
    def extended(self) -> list[str]:
        """The first name of each."""
        return list(self._modules)

    def module(self, name: str, site: Site) -> nn.Module | None:
        """Build the module, and fill it."""
        entry = self._modules[name]
        self.check_base(name, site.matrix, entry["base"])
        kind = MODULES.get(str(entry["spec"].get("kind")))
        if kind is None:
            raise ValueError(f"layer {name} in {self.folder / NAME}: unknown kind of module; get it again.")
        try:
            made = kind.empty(entry["spec"], device="meta")
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"layer {name} in {self.folder / NAME}: {error}") from error
        if made.width != site.matrix.shape[0]:
            raise ValueError(
                f"layer {name} has {site.matrix.shape[0]} outputs, but what stands behind it in {self.folder} "
                f"takes {made.width}."
            )
        filled = self._fill(made, f"{name}.after", made.state_dict(keep_vars=True), site.matrix.device)
        return made if filled else None

    def _fill(self, made: nn.Module, prefix: str, tensors: Mapping[str, Tensor], device: torch.device) -> bool:
        """Put the tensors of the file into what was made without values; False if some are missing."""
        found = {key: self._tensor(f"{prefix}.{key}", like, device) for key, like in tensors.items()}
        if any(value is None for value in found.values()):
            return False
        for key, value in found.items():
            _put(made, key, value)
        check_parts(prefix, made)
        return True

    def _tensor(self, name: str, like: Tensor, device: torch.device) -> Tensor | None:
        """Return a tensor of the file as the parameter or buffer that it was, or None if it is missing."""
        owner = self._shared.get(name, name)
        stored = self.take(owner)
        if stored is None:
            return None
        check_shape(owner, stored, like.shape)
        if stored.is_floating_point() != like.is_floating_point():
            raise ValueError(f"{owner} is stored as {stored.dtype}; the file is damaged.")
        stored = stored.to(device)
        made = nn.Parameter(stored, like.requires_grad) if isinstance(like, nn.Parameter) else stored
        return self._made.setdefault(owner, made).requires_grad_(self._turned.get(name, like.requires_grad))


def groups(model: nn.Module) -> Iterator[tuple[list[str], StructuredMatrix]]:
    """Yield the adapted matrices in use, each with the names of all layers that hold it."""
    found: dict[int, tuple[list[str], StructuredMatrix]] = {}
    for name, matrix in in_use(model).items():
        found.setdefault(id(matrix), ([], matrix))[0].append(name)
    yield from found.values()


def _behind(model: nn.Module) -> Iterator[tuple[list[str], Any, StructuredMatrix]]:
    """Yield what stands behind layers, each with their names and the matrix of the layer."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Extended):
            found.setdefault(id(module.after), []).append(name)
    for names in found.values():
        each: Any = model.get_submodule(names[0])
        (site,) = select(each, lambda *_: True, compressed=True).values()
        yield names, each.after, site.matrix


def _entries(file: Path, layers: Any) -> Iterator[dict[str, Any]]:
    for entry in layers if isinstance(layers, list) else [None]:
        match entry:
            case {"names": [str(), *_], "spec": {}, "base": base} if is_record(base) and _is_rate(
                entry.get("lr")
            ):
                yield entry
            case _:
                raise ValueError(f"{file} holds a damaged entry {str(entry)[:80]!r} of a layer; get it again.")


def _is_rate(lr: Any) -> bool:
    number = isinstance(lr, (int, float)) and not isinstance(lr, bool)
    return lr is None or (number and 0 < lr < math.inf)


def _field(file: Path, config: Mapping[str, Any], key: str, kind: type, of: type) -> Any:
    """Return a list or a mapping by names of a file, or an empty one if there is none."""
    found = config.get(key, kind())
    values = found.values() if isinstance(found, dict) else found
    if not isinstance(found, kind) or not all(isinstance(value, of) for value in values):
        raise ValueError(f"{file} holds a damaged {key!r}, {str(found)[:80]}; get it again.")
    return found


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


def _put(matrix: nn.Module, key: str, value: Any) -> None:
    path, _, name = key.rpartition(".")
    owner = matrix.get_submodule(path)
    (owner._parameters if isinstance(value, nn.Parameter) else owner._buffers)[name] = value
