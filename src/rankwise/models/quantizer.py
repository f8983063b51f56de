"""How plain transformers loads a compressed folder: structured layers take the place of the named ones.

The part that knows transformers' classes is in ``hf_quantizer``. ``import rankwise`` has it imported right
after transformers' own quantizers are, and no earlier, because these take seconds to import.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..core.surgery import StructuredLinear, set_module, structured, unstack
from ..core.ties import declare_ties
from ..core.views import view_of
from ..matrices import StructuredMatrix, from_spec
from ..matrices.base import Place, check_parts, shared_parts

METHOD = "rankwise"
FORMAT = 1
TRIGGER = "transformers.quantizers.auto"
Sharing = Mapping[Place, Place]


def describe(model: nn.Module) -> list[dict[str, Any]]:
    """List the structured matrices of a model as data: ``{"names": [layer, ...], "spec": {...}}`` each.

    Layers that got a bias which their architecture lacks stand under ``"biased"`` too.

    Layers that share a matrix stand in one entry; its tensors are stored under the first name. Where a part of a
    matrix is stored with another layer's, ``"shared"`` says where: ``{"members.1": ["layers.0", "members.1"]}``.
    """
    groups: dict[int, dict[str, Any]] = {}
    known: dict[int, Place] = {}
    for name, layer in structured(model).items():
        if id(layer.matrix) not in groups:
            groups[id(layer.matrix)] = {"names": [], "spec": layer.matrix.spec()}
            if found := shared_parts(layer.matrix, name, known):
                groups[id(layer.matrix)]["shared"] = {part: list(place) for part, _, place in found}
        entry = groups[id(layer.matrix)]
        entry["names"].append(name)
        if layer.biased:
            entry.setdefault("biased", []).append(name)
    return list(groups.values())


def install(model: nn.Module, groups: Any, dtype: torch.dtype, prefix: str = "") -> Sharing:
    """Replace layers of a model by structured ones without values, ready to be loaded.

    Args:
        model: whose layers have their original shapes; it may be on the meta device.
        groups: what :func:`describe` returned; data from a file is fine, it is checked.
        dtype: of the floating-point tensors of the matrices.
        prefix: of names in a model with a head, which its body alone lacks, such as ``model.``.

    Returns:
        the place of each matrix that is stored elsewhere, and of which nothing is there yet: where it is.

    Raises:
        ValueError: if a layer does not exist, is no matrix, is named twice, or has another shape than its spec.
    """
    layers = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, str] = {}  # the layer of each name in the config
    sharing: dict[Place, Place] = {}
    for names, biased, spec, shared in _entries(groups):
        owner = None
        for written in names:
            spellings = (written, written.removeprefix(prefix), prefix + written)
            for spelling in spellings:
                stack = unstack(model, spelling)
                if stack is not None:
                    path = spelling.rpartition(".")[0]
                    layers |= {f"{path}.{i}": part for i, part in stack.named_children()}
            name = next((spelling for spelling in spellings if spelling in layers), None)
            if name is None:
                raise ValueError(
                    f"layer {written} is in the config, but {type(model).__name__} does not have it."
                )
            new = layers[name] = _structured(name, layers[name], spec, dtype, written in biased)
            set_module(model, name, new)
            found[written] = name
            if owner is not None:
                sharing[name, ""] = owner, ""
                continue
            owner = name
            for part, (layer, inside) in shared.items():
                if layer not in found:
                    raise ValueError(
                        f"{part} of layer {written} is said to be of {layer}, which is none; it is damaged."
                    )
                sharing[name, part] = found[layer], inside
    _check_sharing(model, sharing)
    for place in sharing:
        _put(model, place, None)
    return sharing


def finish(model: nn.Module, sharing: Sharing) -> None:
    """Check the tensors that were loaded into the layers of :func:`install`, and share matrices again.

    Raises:
        ValueError: if a tensor was not in the checkpoint, or holds what its matrix cannot use.
    """
    share(model, sharing)
    for name, layer in structured(model).items():
        if layer.bias is not None:
            _check_read(f"{name}.bias", layer.bias)
        if (name, "") not in sharing:
            _check_tensors(f"{name}.matrix", layer.matrix)


def share(model: nn.Module, sharing: Sharing) -> None:
    """Put matrices in the places where :func:`install` left nothing."""
    for place, owner in sharing.items():
        _put(model, place, _matrix(model, owner))
    declare_ties(model)


def path_of(layer: str, part: str) -> str:
    """Return the path of a part of a layer's matrix, "" for the whole."""
    return f"{layer}.matrix.{part}".removesuffix(".")


def register_when_ready() -> None:
    """Register with transformers now if its quantizers are imported, otherwise as soon as they are."""
    if TRIGGER in sys.modules:
        from . import hf_quantizer  # noqa: F401 (importing it registers it)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module, as Python would, and calls :func:`register_when_ready` after its first import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != TRIGGER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            loader = spec.loader

            def run(module: ModuleType) -> None:
                del loader.exec_module  # the class's own from here on
                loader.exec_module(module)
                sys.meta_path.remove(self)
                register_when_ready()

            loader.exec_module = run
        return spec


def _matrix(model: nn.Module, place: Place) -> StructuredMatrix:
    try:
        found = model.get_submodule(path_of(*place))
    except AttributeError:
        found = None
    if not isinstance(found, StructuredMatrix):
        raise ValueError(f"matrices in the config share {path_of(*place)}, which is none; the file is damaged.")
    return found


def _check_sharing(model: nn.Module, sharing: Sharing) -> None:
    """Raise unless all that is stored elsewhere is there, as a matrix like the one that is missing."""
    parts: dict[str, list[str]] = {}
    for layer, part in sharing:
        parts.setdefault(layer, []).append(part)

    def absent(layer: str, part: str) -> int:
        return sum(not other or f"{part}.".startswith(f"{other}.") for other in parts.get(layer, []))

    for place, owner in sharing.items():
        if absent(*place) > 1 or absent(*owner):
            raise ValueError(
                f"{path_of(*place)} and {path_of(*owner)} are both said to be elsewhere; it is damaged."
            )
    for place, owner in sharing.items():
        if _matrix(model, place).spec() != _matrix(model, owner).spec():
            raise ValueError(f"{path_of(*place)} in the config is said to be {path_of(*owner)}, but they differ.")


def _put(model: nn.Module, place: Place, matrix: StructuredMatrix | None) -> None:
    """Put a matrix in its place, or nothing, which keeps the place."""
    holder, _, last = path_of(*place).rpartition(".")
    model.get_submodule(holder)._modules[last] = matrix


def _entries(groups: Any) -> Iterator[tuple[list[str], list[str], Any, dict[str, list[str]]]]:
    if not isinstance(groups, list):
        raise ValueError(f"matrices in the config must be a list of names and specs, got {str(groups)[:80]!r}.")
    for group in groups:
        names = group.get("names") if isinstance(group, Mapping) else None
        if not names or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"matrices in the config holds a damaged entry {str(group)[:80]!r}.")
        biased = group.get("biased", [])
        if not isinstance(biased, list) or not set(map(str, biased)) <= set(names):
            raise ValueError(f"matrices in the config holds a damaged entry {str(group)[:80]!r}.")
        shared = group.get("shared", {})
        if not isinstance(shared, dict) or not all(_is_place(place) for place in shared.values()):
            raise ValueError(f"matrices in the config holds a damaged entry {str(group)[:80]!r}.")
        yield names, biased, group.get("spec"), shared


def _is_place(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def _structured(name: str, layer: nn.Module, spec: Any, dtype: torch.dtype, biased: bool) -> StructuredLinear:
    """Build the structured layer of a spec; the bias of the old one stays, or is made if there is to be one."""
    if isinstance(layer, StructuredLinear):
        raise ValueError(f"layer {name} is named twice in the config.")
    view = view_of(layer)
    if view is None:
        raise ValueError(f"layer {name} is in the config, but a {type(layer).__name__} holds no matrix.")
    try:
        matrix = from_spec(spec, dtype=dtype, device="meta")
    except (ValueError, TypeError) as error:
        raise ValueError(f"layer {name}: {error}") from error
    shape = tuple(view.matrix(layer.get_parameter("weight")).shape)
    if matrix.shape != shape:
        raise ValueError(f"layer {name} is {shape}, but its spec in the config is {tuple(matrix.shape)}.")
    bias: Any = layer.bias
    if biased and bias is None:
        bias = torch.empty(matrix.shape[0], dtype=dtype, device="meta")
    new = StructuredLinear(matrix, bias, view).train(layer.training)
    new.biased = biased
    return new


def _check_tensors(path: str, matrix: StructuredMatrix) -> None:
    wanted = {
        name: t.is_floating_point() for name, t in from_spec(matrix.spec(), device="meta").state_dict().items()
    }
    for name, tensor in matrix.state_dict(keep_vars=True).items():
        _check_read(f"{path}.{name}", tensor)
        if not tensor.is_meta and tensor.is_floating_point() != wanted[name]:
            raise ValueError(f"{path}.{name} is stored as {tensor.dtype}; the checkpoint is damaged.")
    check_parts(path, matrix)


def _check_read(path: str, tensor: Tensor) -> None:
    if not tensor.is_meta and not getattr(
        tensor, "_is_hf_initialized", False
    ):  # transformers' mark of what it read
        raise ValueError(f"{path} is not in the checkpoint; it is incomplete.")
