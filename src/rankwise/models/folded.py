"""A saved model read as if it were dense, one tensor at a time."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..core.files import read_json
from ..core.stacks import Stack, stacks
from ..core.surgery import StructuredLinear, structured
from ..matrices import StructuredMatrix, from_spec
from ..matrices.base import check_parts
from .load import config_from, without_values
from .model_folder import weight_files
from .places import used_names
from .quantizer import FORMAT, METHOD, Sharing, install, path_of, share


class Folded(Mapping[str, Tensor]):
    """The tensors of a saved model by the names that an ordinary one has in its file.

    Each access reads one tensor, or the parts of one structured matrix, which it writes out in float32 or better
    and rounds once to the type that the parts are stored in. Nothing is kept but one 3-D parameter, such as the
    experts of one layer, from which several tensors of a file may be cut; these follow one another.

    Args:
        folder: of :func:`rankwise.save` or of plain transformers.

    Attributes:
        config: what ``config.json`` holds, without the specs of structured matrices.
        layers: the structured layers by their names in the file, without values.

    Raises:
        ValueError: if a file is missing or damaged, tensors that the model needs are missing or of another shape,
            or the model is quantised by another tool.
    """

    def __init__(self, folder: str | Path) -> None:
        from transformers.core_model_loading import revert_weight_conversion

        self.folder = Path(folder)
        self._files = weight_files(self.folder)
        model, self.config, sharing = empty_model(self.folder)
        found = structured(model)
        self._stacks: dict[str, Stack] = dict(stacks(model))
        self._revert = partial(revert_weight_conversion, model)
        self._cut: dict[str, tuple[str, torch.Size]] = {}  # of tensors in ordinary files: stack and shape
        self._whole: tuple[str, Mapping[str, Tensor]] = "", {}
        for path, stack in self._stacks.items():
            whole = torch.empty(stack.shape, device="meta")
            self._cut |= {name: (path, part.shape) for name, part in self._revert({path: whole}).items()}
        inside = tuple(f"{path}." for path in self._stacks)
        written = _written(model, found, inside)
        self.layers: Mapping[str, StructuredLinear] = {written[name]: layer for name, layer in found.items()}
        paths = {(name, part): path_of(written[name], part) for each in sharing.items() for name, part in each}
        self._owners = {paths[place]: paths[owner] for place, owner in sharing.items()}
        self._plain = [
            name
            for name in used_names(model, self._shapes(), self.folder)
            if self._layer(name) is None and name not in self._stacks and not name.startswith(inside)
        ]

    def __iter__(self) -> Iterator[str]:
        yield from self._plain
        yield from self._cut

    def __len__(self) -> int:
        return len(self._plain) + len(self._cut)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._cut:
            return self._of_stack(self._cut[name][0])[name].clone()
        layer = self.layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if layer is None:
            return self._stored(name)
        dtype = self._stored(name).dtype
        matrix = self.matrix(name.removesuffix(".weight")).to(torch.promote_types(dtype, torch.float32))
        return _restored(layer, matrix.dense().detach().to(dtype))

    def parts(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor whole."""
        yield self[name]

    def empty(self, name: str) -> Tensor:
        """Return a tensor on the meta device of the shape and type that ``self[name]`` has."""
        if name in self._cut:
            path, shape = self._cut[name]
            return torch.empty(shape, dtype=self._stored(path).dtype, device="meta")
        layer = self.layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        with safe_open(self._files[name], framework="pt") as opened:
            part = opened.get_slice(name)
            shape = part.get_shape() if layer is None else (layer.out_features, layer.in_features)
            dtype = part[:0].dtype if part.get_shape() else opened.get_tensor(name).dtype
        like = torch.empty(shape, dtype=dtype, device="meta")
        return like if layer is None else _restored(layer, like)

    def matrix(self, name: str) -> StructuredMatrix:
        """Return the structured matrix of a layer, with its values in the types of the file."""
        matrix = from_spec(self.layers[name].matrix.spec(), device="meta")
        values = {}
        for key, like in matrix.state_dict().items():
            path = self._place(f"{name}.matrix.{key}")
            if path not in self._files:
                raise ValueError(f"{path} is not in the checkpoint; it is incomplete.")
            values[key] = self._stored(path)
            same_kind = values[key].is_floating_point() == like.is_floating_point()
            if values[key].shape != like.shape or not same_kind:
                raise ValueError(
                    f"{path} is stored as {values[key].dtype} {tuple(values[key].shape)}; the file is damaged."
                )
        matrix.load_state_dict(values, assign=True)
        check_parts(f"{name}.matrix", matrix)
        return matrix

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor in the files."""
        found = {}
        for file in dict.fromkeys(self._files.values()):
            with safe_open(file, framework="pt") as opened:
                names = [name for name, place in self._files.items() if place == file]
                found |= {name: tuple(opened.get_slice(name).get_shape()) for name in names}
        return found

    def _place(self, path: str) -> str:
        """Return under which name a tensor of a matrix is stored, which may be shared, as a whole or in part."""
        for own, owner in self._owners.items():
            if path.startswith(f"{own}."):
                return self._place(owner + path.removeprefix(own))
        return path

    def _of_stack(self, path: str) -> Mapping[str, Tensor]:
        """Return the tensors of an ordinary file that are cut from a 3-D parameter."""
        if self._whole[0] != path:
            matrices = [self[f"{path}.{i}.weight"] for i in range(len(self._stacks[path]))]
            self._whole = path, self._revert({path: torch.stack(matrices)})
        return self._whole[1]

    def _stored(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def _layer(self, name: str) -> str | None:
        """Return the layer whose matrix a tensor is a part of, if any."""
        layer, found, _ = name.partition(".matrix.")
        return layer if found and layer in self.layers else None


def empty_model(folder: Path) -> tuple[Any, dict[str, Any], Sharing]:
    """Return the model of a folder on the meta device, compressed or not.

    Returns:
        the model; what ``config.json`` holds, without the specs of structured matrices; and where matrices stand
        that are stored elsewhere.

    Raises:
        ValueError: if the config is damaged, or the model is quantised by another tool.
    """
    file = folder / "config.json"
    data = read_json(file)
    try:
        groups = _groups(data.pop("quantization_config", None))
        model = without_values(config_from(data))
        sharing = install(model, groups, model.dtype, f"{model.base_model_prefix}.")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    share(model, sharing)
    return model, data, sharing


def _groups(quantization: Any) -> Any:
    if quantization is None:
        return []
    if not isinstance(quantization, dict):
        raise ValueError(f"quantization_config must hold fields, got {str(quantization)[:80]!r}; it is damaged.")
    if quantization.get("quant_method") != METHOD or quantization.get("version") != FORMAT:
        raise ValueError(
            f"the model is quantised by {quantization.get('quant_method')!r}, version "
            f"{quantization.get('version')!r}; only {METHOD!r}, version {FORMAT}, can be folded."
        )
    if not isinstance(groups := quantization.get("matrices"), list):
        raise ValueError(f"matrices must be a list of names and specs, got {str(groups)[:80]!r}; it is damaged.")
    return groups


def file_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Return the name that each tensor of a model has in a file; transformers keeps older names there."""
    from transformers.core_model_loading import revert_weight_conversion

    names = list(names)
    found = revert_weight_conversion(model, {name: torch.tensor(i) for i, name in enumerate(names)})
    renamed = {names[int(number)]: name for name, number in found.items()}
    return {name: renamed.get(name, name) for name in names}


def _written(model: Any, layers: Mapping[str, StructuredLinear], same: tuple[str, ...]) -> dict[str, str]:
    """Return the name that each layer has in a file. Names that begin as one in ``same`` are the same."""
    found = file_names(model, [f"{name}.weight" for name in layers if not name.startswith(same)])
    renamed = {name.removesuffix(".weight"): file.removesuffix(".weight") for name, file in found.items()}
    return {name: renamed.get(name, name) for name in layers}


def _restored(layer: StructuredLinear, weight: Tensor) -> Tensor:
    """See an (m, n) weight as the ordinary layer stores it."""
    return layer.view.restore(weight, None).get_parameter("weight").detach()
