"""What all folders of adapters share: files that are read once, and what of them was used."""

import abc
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..core.adapted import Adaptation, own_tensors
from ..core.extended import refuse_extended
from ..core.files import read_json
from ..core.finite import is_finite
from ..core.surgery import Site, select
from ..core.views import View
from ..matrices import StructuredMatrix
from .bases import is_other
from .classifier import read_labels

NONE = "the model has no adapter in use; make one with rankwise.adapt, or save it as a model."
_UNTIE = "give each of them a parameter of its own first"


class AdapterFolder(abc.ABC):
    """The adapters in a folder; each is made for a matrix that is given.

    Args:
        config: the file that describes them.
        tensors: the file that holds their numbers.

    Attributes:
        title: what messages call it.
        missing: names of tensors that were asked for in vain.
        others: layers whose matrix had other values than the one that was adapted.
        labels: of a classifier, the names of its classes.

    Raises:
        ValueError: if a file is damaged.
    """

    def __init__(self, config: Path, tensors: Path) -> None:
        self.folder, self.title = config.parent, str(config.parent)
        self.config, self.tensors = read_json(config), read_tensors(tensors)
        self.labels = read_labels(self.folder)
        self.missing: list[str] = []
        self.others: list[str] = []
        self._used: set[str] = set()

    def prepare(self, model: nn.Module) -> None:  # noqa: B027 (most need not)
        """Look at the model that the adapters are for, before all else."""

    @property
    @abc.abstractmethod
    def layers(self) -> list[str]:
        """The layers that have an adapter; of those that share one, the first."""

    @abc.abstractmethod
    def wanted(self, names: Iterable[str], head: str | None) -> list[str]:
        """Return which layers of a model ought to have an adapter; ``head`` is its output head, if it has one."""

    @property
    @abc.abstractmethod
    def whole(self) -> Mapping[str, str]:
        """The names in the file of the parameters that the file replaces, by their names in the model."""

    @property
    def unties(self) -> bool:
        """Whether a parameter was trained apart from others that it is tied to."""
        return False

    def named(self, key: str) -> str:
        """Return the name in a model of a parameter that has this one in the file."""
        return key

    @abc.abstractmethod
    def matrix(self, name: str, base: StructuredMatrix, view: View) -> StructuredMatrix | None:
        """Return a layer's matrix around the one given, or None if tensors are missing.

        Raises:
            ValueError: if something does not fit.
        """

    def rate(self, name: str) -> float | None:
        """Return the learning rate that was suggested for a layer."""
        return None

    @property
    def extended(self) -> list[str]:
        """The layers that a module goes behind; of those that share one, the first."""
        return []

    def module(self, name: str, site: Site) -> nn.Module | None:
        """Return the module that goes behind a layer, or None if tensors are missing.

        Raises:
            ValueError: if something does not fit.
        """
        raise ValueError(f"{self.title} holds no module behind {name}.")

    def check_base(self, name: str, base: StructuredMatrix, record: Mapping[str, Any]) -> None:
        """Note a layer whose matrix has other values than the recorded one.

        Raises:
            ValueError: if it has another shape.
        """
        if is_other(name, base, record, self.title) and name not in self.others:
            self.others.append(name)

    def take(self, name: str) -> Tensor | None:
        """Return a tensor, or note that it is missing."""
        if name not in self.tensors:
            self.missing.append(name)
            return None
        self._used.add(name)
        return self.tensors[name]

    @property
    def unexpected(self) -> list[str]:
        """Names of tensors that nothing asked for."""
        return sorted(self.tensors.keys() - self._used)

    def adaptation(self, model: nn.Module) -> Adaptation:
        """Make all adapters for a model, which stays as it is.

        Raises:
            ValueError: if something does not fit.
        """
        sites, made = sites_of(model), {}
        self.refuse_tied(model, sites)
        self.prepare(model)
        for name in dict.fromkeys([*self.layers, *self.wanted(sites, head_of(model))]):
            if name in sites:
                site = sites[name]
                matrix = self.matrix(name, site.under, site.view)
                if matrix is not None:
                    _, first = made.setdefault(site.name, (site, matrix.train(site.layer.training)))
                    _check_same(name, site, own_tensors(first), own_tensors(matrix))
        matrices = list(made.values())
        behind = [(sites[name], self.module(name, sites[name])) for name in self.extended if name in sites]
        modules = [(site, made.train(site.layer.training)) for site, made in behind if made is not None]
        whole = self._parameters(model)
        missing = sorted(set(self.missing))
        found = {site.name: self.rate(site.name) for site, _ in (*matrices, *modules)}
        rates = {name: rate for name, rate in found.items() if rate is not None}
        return Adaptation(matrices, modules, whole, missing, self.unexpected, self.others, rates)

    def refuse_tied(self, model: nn.Module, sites: Mapping[str, Site]) -> None:
        """Raise ValueError if an embedding has an adapter that shares its weight with the head."""
        every = dict(model.named_modules(remove_duplicate=False))
        for name in self.layers:
            if name not in sites and isinstance(every.get(name), nn.Embedding):
                raise ValueError(
                    f"{self.title} adapts {name} alone, which shares its weight with another layer; {_UNTIE}."
                )

    def replaced(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
        """Return ``whole``, with all other names of the parameters that are replaced, as those of tied ones.

        Args:
            parameters: of a model, by all names.

        Raises:
            ValueError: if parameters that are tied in the model are not so in the file.
        """
        found, keys = dict(self.whole), {}
        for name, key in self.whole.items():
            if name in parameters and key in self.tensors:
                first = keys.setdefault(id(parameters[name]), key)
                if not torch.equal(self.tensors[first], self.tensors[key]):
                    raise ValueError(
                        f"{key} is tied to another parameter in this model, but not in the file; {_UNTIE}."
                    )
        for name, own in parameters.items():
            if id(own) in keys and name not in found:
                if self.unties:
                    raise ValueError(f"{name} is tied to a parameter that was trained without it; {_UNTIE}.")
                found[name] = keys[id(own)]
        return found

    def _parameters(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the parameters that are replaced, with their values; what repeats a value counts as read."""
        found: dict[int, tuple[nn.Parameter, Tensor]] = {}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, key in self.replaced(parameters).items():
            if name in parameters and (value := self.take(key)) is not None:
                check_shape(key, value, parameters[name].shape)
                found.setdefault(id(parameters[name]), (parameters[name], value))
        for key in self.unexpected:
            own = parameters.get(self.named(key))
            if own is not None and torch.equal(
                found.get(id(own), (own, own.detach()))[1].cpu(), self.tensors[key]
            ):
                self._used.add(key)
        return list(found.values())


def sites_of(model: nn.Module) -> dict[str, Site]:
    """Return the layers of a model that can hold an adapter, by each of their names.

    Raises:
        ValueError: if one has a module behind it.
    """
    refuse_extended(model, "load the model anew")
    found = select(model, lambda name, layer: True, compressed=True, tables=True)
    return {name: site for site in found.values() for name in site.names}


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read all tensors of a file.

    Raises:
        ValueError: if it is missing or cut short, or a number is not finite.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            # a copy: mapped memory is aligned in another way, which changes sums in the last bit
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is missing, damaged or cut short ({error}); get it again.") from error
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise ValueError(
                f"{name} in {file} holds NaN or infinity; the training went wrong before it was saved."
            )
    return tensors


def check_shape(name: str, tensor: Tensor, shape: Iterable[int]) -> None:
    """Raise unless a tensor of a file has the shape that the model asks for."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} is {tuple(tensor.shape)} in the file, but the model asks for {tuple(shape)}.")


def _check_same(name: str, site: Site, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    if one.keys() != other.keys() or not all(torch.equal(one[key], other[key]) for key in one):
        raise ValueError(
            f"{' and '.join(site.names)} share a weight in the model, but {name} has its own adapter."
        )


def head_of(model: Any) -> str | None:
    """Return the name of the output head of a model of transformers."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return next((name for name, module in model.named_modules() if head is not None and module is head), None)
