"""A saved model read as if it were dense, one tensor at a time."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..core.surgery import StructuredLinear, structured
from ..matrices import StructuredMatrix, from_spec
from .load import check_files, kind_of
from .quantizer import FORMAT, METHOD, install


class Folded(Mapping[str, Tensor]):
    """The tensors of a saved model by the names that an ordinary one has in its file.

    Nothing is kept: each access reads one tensor, or the parts of one structured matrix, which it writes out in
    float32 or better and rounds once to the type that the parts are stored in.

    Args:
        folder: of :func:`rankwise.save` or of plain transformers.

    Attributes:
        config: what ``config.json`` holds, without the specs of structured matrices.
        layers: the structured layers by their names in the file, without values.

    Raises:
        ValueError: if a file is missing or damaged, or the model is quantised by another tool.
    """

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoConfig

        self.folder = Path(folder)
        check_files(self.folder)
        self.config: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        groups = _groups(self.config.pop("quantization_config", None))
        self._files = {name: file for file in sorted(self.folder.glob("*.safetensors")) for name in _names(file)}
        self.layers: Mapping[str, StructuredLinear] = {}
        if groups:
            config = AutoConfig.for_model(**self.config)
            with torch.device("meta"):
                kind = kind_of(config)
                model = kind._from_config(config) if hasattr(kind, "_from_config") else kind.from_config(config)
            sharing = install(model, groups, torch.float32, f"{model.base_model_prefix}.")
            found = structured(model)
            for name, owner in sharing.items():
                found[name].matrix = found[owner].matrix
            written = _written(model, found)
            self.layers = {written[name]: layer for name, layer in found.items()}
            self._owners = {written[name]: written[owner] for name, owner in sharing.items()}
        for name in self.layers:
            if f"{name}.weight" not in self._files:
                raise ValueError(f"{self.folder}: layer {name} is not in the checkpoint; it is incomplete.")
        self._parts = {name for name in self._files if self._layer(name) is not None}

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._files if name not in self._parts)

    def __len__(self) -> int:
        return len(self._files) - len(self._parts)

    def __getitem__(self, name: str) -> Tensor:
        layer = self.layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if layer is None:
            return self._stored(name)
        dtype = self._stored(name).dtype
        matrix = self.matrix(name.removesuffix(".weight")).to(torch.promote_types(dtype, torch.float32))
        return _restored(layer, matrix.dense().detach().to(dtype))

    def empty(self, name: str) -> Tensor:
        """Return a tensor on the meta device of the shape and type that ``self[name]`` has."""
        layer = self.layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        with safe_open(self._files[name], framework="pt") as opened:
            part = opened.get_slice(name)
            shape = part.get_shape() if layer is None else (layer.out_features, layer.in_features)
            dtype = part[:0].dtype if part.get_shape() else opened.get_tensor(name).dtype
        like = torch.empty(shape, dtype=dtype, device="meta")
        return like if layer is None else _restored(layer, like)

    def matrix(self, name: str) -> StructuredMatrix:
        """Return the structured matrix of a layer, with its values in the types of the file."""
        owner = self._owners.get(name, name)
        matrix = from_spec(self.layers[name].matrix.spec(), device="meta")
        values = {}
        for key, like in matrix.state_dict().items():
            path = f"{owner}.matrix.{key}"
            if path not in self._files:
                raise ValueError(f"{path} is not in the checkpoint; it is incomplete.")
            values[key] = self._stored(path)
            same_kind = values[key].is_floating_point() == like.is_floating_point()
            if values[key].shape != like.shape or not same_kind:
                raise ValueError(
                    f"{path} is stored as {values[key].dtype} {tuple(values[key].shape)}; the file is damaged."
                )
        matrix.load_state_dict(values, assign=True)
        for path, part in matrix.named_modules():
            if isinstance(part, StructuredMatrix):
                try:
                    part.check()
                except ValueError as error:
                    raise ValueError(f"{f'{owner}.matrix.{path}'.rstrip('.')}: {error}") from error
        return matrix

    def _stored(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def _layer(self, name: str) -> str | None:
        """Return the layer whose matrix a tensor is a part of, if any."""
        layer, found, _ = name.partition(".matrix.")
        return layer if found and layer in self.layers else None


def _groups(quantization: Any) -> Any:
    if quantization is None:
        return None
    if quantization.get("quant_method") != METHOD or quantization.get("version") != FORMAT:
        raise ValueError(
            f"the model is quantised by {quantization.get('quant_method')!r}, version "
            f"{quantization.get('version')!r}; only {METHOD!r}, version {FORMAT}, can be folded."
        )
    return quantization.get("matrices")


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _written(model: Any, layers: Mapping[str, StructuredLinear]) -> dict[str, str]:
    """Return the name that each layer has in a file; transformers' newer models keep older names there."""
    from transformers.core_model_loading import revert_weight_conversion

    names = list(layers)
    numbered = {f"{name}.weight": torch.tensor(i) for i, name in enumerate(names)}
    found = revert_weight_conversion(model, numbered)
    return {names[int(number)]: name.removesuffix(".weight") for name, number in found.items()}


def _restored(layer: StructuredLinear, weight: Tensor) -> Tensor:
    """See an (m, n) weight as the ordinary layer stores it."""
    return layer.view.restore(weight, None).get_parameter("weight").detach()
