"""The weights of a model on disk as those of the classifier that is made of it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.surgery import StructuredLinear
from ..matrices import StructuredMatrix
from .classifier import NO_HEAD, classifier_config, is_head, name_classes
from .folded import Folded, file_names
from .quiet import quiet


class ClassifierWeights(Mapping[str, Tensor]):
    """The tensors of a saved model by the names that they have in a file of its classifier.

    Those of a new head are there by name and shape alone.

    Args:
        base: the model, compressed or not.
        labels: the names of the classes.

    Attributes:
        folder: of the model.
        config: of the classifier.
        layers: the structured layers by their names in a file, without values.
        tokenizer: of the model, if it has one; it can pad texts.

    Raises:
        ValueError: if no classifier can be made of the model.
    """

    def __init__(self, base: Folded, labels: Sequence[str]) -> None:
        import transformers

        self.folder, self._base = base.folder, base
        config, self.tokenizer = classifier_config(base.folder, labels)
        if config.num_labels == len(labels):
            name_classes(config, labels)  # in the order of the outputs, which may not be that of the base
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        try:
            with quiet(), torch.device("meta"):
                known = (config.architectures or [""])[0]  # of sounds, where the class for texts knows none
                if known.endswith("ForSequenceClassification") and hasattr(transformers, known):
                    model: Any = getattr(transformers, known)(config)
                else:
                    model = transformers.AutoModelForSequenceClassification.from_config(config)
        except ValueError as error:
            raise ValueError(f"{base.folder} cannot be made a classifier: {error}") from error
        config.architectures = [type(model).__name__]
        self.config: dict[str, Any] = json.loads(config.to_json_string())
        prefix, state = f"{model.base_model_prefix}.", model.state_dict()
        written, there = file_names(model, state), set(base)
        self._places: dict[str, str] = {}
        self._new: dict[str, Tensor] = {}
        for name, empty in state.items():
            spellings = (written[name], name, name.removeprefix(prefix), prefix + name)
            place = next((spelling for spelling in spellings if spelling in there), None)
            if place is not None and base.empty(place).numel() == empty.numel():
                self._places[written[name]] = place
            elif is_head(model, name):
                self._new[written[name]] = empty.to(getattr(config, "dtype", None) or empty.dtype)
            else:
                raise ValueError(f"{base.folder} has no tensor {name}, which its classifier needs.")
        layers = {name.removesuffix(".weight"): old.removesuffix(".weight") for name, old in self._places.items()}
        self._layers = {name: old for name, old in layers.items() if old in base.layers}

    @property
    def layers(self) -> Mapping[str, StructuredLinear]:
        """The layers that are compressed."""
        return {name: self._base.layers[old] for name, old in self._layers.items()}

    @property
    def new(self) -> frozenset[str]:
        """The tensors of a new head."""
        return frozenset(self._new)

    def __iter__(self) -> Iterator[str]:
        yield from (*self._places, *self._new)

    def __len__(self) -> int:
        return len(self._places) + len(self._new)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._new:
            raise ValueError(NO_HEAD.format(name=name, folder=self.folder))
        return self._base[self._places[name]]

    def empty(self, name: str) -> Tensor:
        """Return a tensor on the meta device of the shape and type that ``self[name]`` has."""
        return self._new[name] if name in self._new else self._base.empty(self._places[name])

    def matrix(self, name: str) -> StructuredMatrix:
        """Return the structured matrix of a layer."""
        return self._base.matrix(self._layers[name])
