"""The weights of a model on disk with an adapter put into them, one tensor at a time."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.surgery import Site, StructuredLinear
from ..core.views import SliceView
from ..matrices import Dense, StructuredMatrix
from .adapter_folder import AdapterFolder, head_of, sites_of
from .classifier import NO_HEAD, load_classifier, new_head, put_labels
from .classifier_weights import ClassifierWeights
from .folded import Folded, file_names
from .lines import lines_of, lines_of_change, takes_any_type
from .load import config_from, load, without_values

Source = Folded | ClassifierWeights
BLOCK = 2**18  # numbers of a matrix that are made at a time


class AdaptedWeights:
    """The tensors of a model by the names that they have in its files, with an adapter put into them.

    Each is made some lines at a time, in float32 or wider, and rounded once. Beside the adapter that takes the
    stored tensor and these lines, never the new tensor; where the adapter does not just add something to the
    matrix, a copy of it in float32.

    Args:
        base: the model, compressed or not.
        adapter: that was made for it.
        memory: the most that one tensor may take, in bytes, or None.

    Attributes:
        model: of the architecture, without values.
        names: of the adapted layers, by the names of their weights in the files.
        folder: of the model.
        config: of the model.

    Raises:
        ValueError: if a layer does not exist, is a slice of a 3-D parameter, or has a module behind it.
    """

    def __init__(
        self, base: Folded | ClassifierWeights, adapter: AdapterFolder, memory: int | None = None
    ) -> None:
        self.adapter, self.memory, self._base = adapter, memory, base
        self.folder, self.config = base.folder, base.config
        for name in adapter.extended:
            raise ValueError(
                f"{adapter.title} has a module behind {name}, which is no change of a weight: it can be neither "
                "merged nor exported; use load_adapter."
            )
        self.model = without_values(config_from(base.config))
        self._sites: Mapping[str, Site] = sites_of(self.model)
        adapter.refuse_tied(self.model, self._sites)
        adapter.prepare(self.model)
        layers = list(dict.fromkeys([*adapter.layers, *adapter.wanted(self._sites, head_of(self.model))]))
        for name in layers:
            if name not in self._sites:
                raise ValueError(f"{adapter.title} adapts {name}, which {base.folder} does not have.")
            if isinstance(self._sites[name].view, SliceView):
                raise ValueError(
                    f"{name} is a slice of a 3-D parameter; use load_adapter, fold and save instead."
                )
        own = {name: name for name in layers}
        shared = {other: own.get(other, name) for name in layers for other in self._sites[name].names}
        self.names = self._in_files({f"{other}.weight": name for other, name in shared.items()})
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self.whole = self._in_files(adapter.replaced(parameters))

    def load(self, dtype: torch.dtype) -> Any:
        """Return the adapted model in memory."""
        folder = self.folder.absolute()  # a short name may be an embedded model's
        return adapted_model(folder, self.adapter, dtype)[0]

    def save_tokenizer(self, out: Path) -> None:
        """Write the tokenizer of a classifier, which can pad texts though that of the model may not."""
        if isinstance(self._base, ClassifierWeights) and self._base.tokenizer is not None:
            self._base.tokenizer.save_pretrained(out)

    @property
    def layers(self) -> Mapping[str, StructuredLinear]:
        """The layers that are compressed, by their names in the files, without values."""
        return self._base.layers

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def parts(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor in parts, in the order of its file, in the type of the files."""
        if name in self.names:
            yield from self._made(name, lines_of, self.empty(name).dtype)
        else:
            if self.memory is not None and _bytes(self.empty(name)) > self.memory:
                raise ValueError(
                    f"{name} takes {_bytes(self.empty(name))} bytes of memory at least; give more, or no limit."
                )
            yield self._replaced(name) if name in self.whole else self._base[name]

    def empty(self, name: str) -> Tensor:
        """Return a tensor on the meta device of the shape and type that ``self[name]`` has."""
        return self._base.empty(name)

    def site(self, name: str) -> Site:
        """Return the layer whose weight has a name."""
        return self._sites[self.names[name]]

    def matrix(self, name: str) -> StructuredMatrix:
        """Return the adapted matrix of the layer whose weight has a name, around the values of the model.

        Raises:
            ValueError: if it is not the one that was adapted, or tensors are missing.
        """
        layer = name.removesuffix(".weight")
        if layer in self._base.layers:
            base = self._base.matrix(layer)
        else:
            base = Dense(self.site(name).view.matrix(self._base[name]))
        matrix = self.adapter.matrix(self.names[name], base.requires_grad_(False), self.site(name).view)
        self._check()
        if matrix is None:  # an adapter of rank 0
            return base
        wide = torch.promote_types(base.dtype, torch.float32)
        return matrix.eval().requires_grad_(False) if takes_any_type(matrix) else matrix.to(wide).eval()

    def change(self, name: str) -> Iterator[Tensor]:
        """Yield in parts, in float32, what the adapter adds to a tensor of ``names`` or ``whole``.

        To a matrix it adds to what its parts say, not to that as it is rounded when it is written out.
        """
        if name in self.names:
            yield from self._made(name, lines_of_change, torch.float32)
        elif isinstance(self._base, ClassifierWeights) and name in self._base.new:
            raise ValueError(
                f"{name} is of a new head, and {self.folder} has no values to subtract from it; export to merged."
            )
        else:
            yield (self._replaced(name, torch.float32) - self._base[name]).float()

    @torch.no_grad()
    def _made(self, name: str, lines_from: Callable[..., Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
        """Make a tensor of a layer from an adapted matrix, some lines at a time as the layer stores them."""
        matrix = self.matrix(name)
        axis = 0 if self.site(name).view.matrix(self.empty(name)).is_contiguous() else 1
        lines, step = matrix.shape[axis], self._step(name, matrix, axis)
        for start in range(0, lines, step):
            part = lines_from(matrix, axis, start, min(start + step, lines)).to(dtype)
            yield part if axis == 0 else part.mT

    def parameter(self, name: str) -> Tensor:
        """Return a parameter by its name in the model, which no adapter changes but may replace."""
        (place,) = self._in_files({name: name})
        return self._replaced(place) if place in self.whole else self._base[place]

    def _replaced(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a parameter that the adapter holds whole, in the type of the files or another one."""
        value, empty = self.adapter.take(self.whole[name]), self.empty(name)
        self._check()
        assert value is not None
        if value.shape != empty.shape:
            raise ValueError(
                f"{name} is {tuple(value.shape)} in the adapter, but {tuple(empty.shape)} in the model."
            )
        return value.to(dtype or empty.dtype)

    def finish(self) -> None:
        """Raise if there is something in the adapter that no tensor was made with.

        Raises:
            ValueError: which lists it.
        """
        repeated = {key for key in self.adapter.unexpected if self._repeats(key)}
        if rest := [key for key in self.adapter.unexpected if key not in repeated]:
            raise ValueError(f"{self.adapter.title} holds tensors that nothing reads: {', '.join(rest)}.")

    def _repeats(self, key: str) -> bool:
        """Whether a tensor says again what the model or the adapter says, as those of tied embeddings do."""
        value = self.adapter.tensors[key]
        others = [self.adapter.tensors[other] for other in self.whole.values()]
        stored = next(iter(self._in_files({self.adapter.named(key): key}, strict=False)), None)
        others += [] if stored is None else [self._base[stored]]
        return any(torch.equal(value, other) for other in others)

    def _check(self) -> None:
        for words, names in (
            ("lacks", self.adapter.missing),
            ("was made for other values of", self.adapter.others),
        ):
            if names:
                raise ValueError(
                    f"{self.adapter.title} {words} {', '.join(names)}; give the model that was adapted."
                )

    def _step(self, name: str, matrix: StructuredMatrix, axis: int) -> int:
        """How many lines to make at a time."""
        (m, n), length = matrix.shape, matrix.shape[1 - axis]
        step = max(1, BLOCK // length)
        if self.memory is None:
            return step
        beside, empty = takes_any_type(matrix), self.empty(name)
        free = self.memory - _bytes(empty) - (0 if beside else 4 * m * n)
        each = 4 * 4 * (length if beside else m + n)  # of the base, of the change, their sum, and that rounded
        if free < each:
            needed = self.memory - free + each
            raise ValueError(f"{name} takes {needed} bytes of memory at least; give more, or no limit.")
        return min(step, free // each)

    def _in_files(self, wanted: Mapping[str, str], strict: bool = True) -> dict[str, str]:
        """Give the keys of a mapping, names in the model, the names that they have in the files."""
        written, found, known = file_names(self.model, wanted), {}, set(self._base)
        prefix = f"{self.model.base_model_prefix}."
        lost = {}
        for name, value in wanted.items():
            spellings = (written[name], name, name.removeprefix(prefix), prefix + name)
            place = next((spelling for spelling in spellings if spelling in known), None)
            (lost if place is None else found)[place or name] = value
        if lone := [name for name, value in lost.items() if strict and value not in found.values()]:
            raise ValueError(
                f"{lone[0]} is adapted, but {self.folder} has no tensor of this name; give the model that was "
                "adapted."
            )
        return found


def adapted_model(base: str | Path, adapter: AdapterFolder, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Load a model with the adapter that was made for it, and its tokenizer; a classifier if it is of one.

    Raises:
        ValueError: if they do not belong together, or a classifier's head has no values.
    """
    labels = adapter.labels
    model, tokenizer = load_classifier(base, labels, dtype=dtype) if labels else load(base, dtype=dtype)
    put_labels(model, labels)
    adaptation = adapter.adaptation(model)
    adaptation.check(adapter.title)
    replaced = {id(parameter) for parameter, _ in adaptation.whole}
    for name in sorted(new_head(model)):
        if id(model.get_parameter(name)) not in replaced:
            raise ValueError(NO_HEAD.format(name=name, folder=base))
    adaptation.apply(model, adapter.title)
    return model, tokenizer


def open_weights(base: str | Path, adapter: AdapterFolder, memory: int | None) -> AdaptedWeights:
    """Open the folder of a model, and put an adapter around its weights, or around those of its classifier."""
    folded = Folded(base)
    return AdaptedWeights(
        ClassifierWeights(folded, adapter.labels) if adapter.labels else folded, adapter, memory
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
