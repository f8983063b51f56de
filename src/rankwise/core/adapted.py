"""Adapted layers: which they are, and how layers of a model become ones."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..matrices import Base, Several, StructuredMatrix
from .extended import extended, name_without
from .rates import GENERAL
from .report import Report
from .several import choose, join, used
from .surgery import Site, StructuredLinear, base_of, put_behind, replace, sizes_of, structured
from .ties import declare_ties


def adapted(model: nn.Module) -> Mapping[str, StructuredLinear]:
    """Return the layers of a model that have an adapter, by name."""
    return {name: layer for name, layer in structured(model).items() if base_of(layer.matrix) is not None}


def in_use(model: nn.Module) -> dict[str, StructuredMatrix]:
    """Return the adapted matrices of a model by layer; of adapters with names what is in use, where something is.

    Raises:
        ValueError: if each row of a batch has its own.
    """
    made: dict[int, StructuredMatrix] = {}
    for layer in adapted(model).values():
        matrix = layer.matrix
        if id(matrix) not in made:
            made[id(matrix)] = matrix.expression if isinstance(matrix, Several) else matrix
    found = {name: made[id(layer.matrix)] for name, layer in adapted(model).items()}
    return {name: matrix for name, matrix in found.items() if not isinstance(matrix, Base)}


def rate_of(layer: StructuredLinear) -> float | None:
    """Return the learning rate that a layer's adapter suggests, of those in use if there are several."""
    return layer.matrix.rate if isinstance(layer.matrix, Several) else layer.lr


def refuse_adapted(model: nn.Module) -> None:
    """Raise ValueError if a layer has an adapter."""
    for name in adapted(model):
        raise ValueError(f"layer {name} has an adapter; fold it first, or train the adapter with finetune.")


def own_tensors(matrix: StructuredMatrix) -> dict[str, Tensor]:
    """Return what an adapted matrix holds that is not its base's: parameters and buffers, by name."""
    bases = tuple(f"{path}." if path else "" for path, part in _parts(matrix) if isinstance(part, Base))
    state = matrix.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if not name.startswith(bases)}


def suggested_rates(model: nn.Module) -> dict[int, float]:
    """Return the learning rates that adapters suggest, by the ids of their trained parameters."""
    parts: list[tuple[nn.Module, float | None]] = []
    for layer in adapted(model).values():
        matrix = layer.matrix
        if isinstance(matrix, Several):
            parts += [(expression, matrix.rates[name]) for name, expression in matrix.adapters.items()]
        else:
            parts.append((matrix, layer.lr))
    parts += [(layer.after, layer.lr) for layer in extended(model).values()]
    return {id(p): GENERAL if lr is None else lr for part, lr in parts for p in part.parameters()}


def whole_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train and are no adapter's, by their first names, without what is in between.

    Raises:
        ValueError: if a matrix under an adapter trains.
    """
    layers = adapted(model).values()
    inside = {id(parameter) for layer in layers for parameter in layer.matrix.parameters()}
    inside |= {id(parameter) for each in extended(model).values() for parameter in each.after.parameters()}
    for name, layer in adapted(model).items():
        for path, part in _parts(layer.matrix):
            if isinstance(part, Base) and any(p.requires_grad for p in part.parameters()):
                raise ValueError(f"{name}.matrix.{path} trains, though it is under an adapter; freeze it.")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain = name_without(model)
    return {plain(name): p for name, p in trained.items() if id(p) not in inside}


@dataclass(frozen=True)
class Adaptation:
    """What a file of an adapter holds, made for the layers of a model, which is as it was.

    Args:
        matrices: the sites to adapt, each with its new matrix.
        modules: the sites behind which a module goes, each with that.
        whole: parameters of the model that the file replaces, with their values.
        missing: names of tensors that ought to be in the file.
        unexpected: names of tensors in the file that nothing reads.
        others: layers whose base is another than the one that was adapted.
        rates: the learning rates that were suggested for layers, by the first names of their sites.
    """

    matrices: list[tuple[Site, StructuredMatrix]]
    modules: list[tuple[Site, nn.Module]] = field(default_factory=list)
    whole: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    rates: Mapping[str, float] = field(default_factory=dict)

    def check(self, source: str, strict: bool = True) -> None:
        """Raise unless all tensors were there and read, and the bases are those that were adapted.

        If not strict, it is enough that some layer gets an adapter.

        Raises:
            ValueError: which lists the names.
        """
        for words, names in (
            ("lacks tensors that the adapter needs", self.missing),
            ("holds tensors that nothing in this model reads", self.unexpected),
            ("was made for other values of the layers under it", self.others),
        ):
            if strict and names:
                raise ValueError(
                    f"{source} {words}: {', '.join(names)}. Give the model that was adapted; load_adapter with "
                    "strict=False goes on without."
                )
        if not self.matrices and not self.modules:
            raise ValueError(f"{source} holds no adapter of a layer of this model.")

    def apply(self, model: nn.Module, title: str, name: str | None = None) -> Report:
        """Put the matrices into the model, and let the same train as when they were written.

        With a name they stand beside others, and are then in use.
        """
        rows = []
        with used(model, None):
            model.requires_grad_(False)
            for site, matrix in self.matrices:
                for part in matrix.modules():
                    if isinstance(part, Base):
                        part.requires_grad_(False)
                trained = sum(p.numel() for p in matrix.parameters() if p.requires_grad)
                rows.append({"name": site.name, "shape": list(matrix.shape), "trained": trained})
                if name is None:
                    replace(model, site, matrix, lr=self.rates.get(site.name))
                else:
                    join(model, site, name, matrix, self.rates.get(site.name))
        if name is not None:
            choose(model, name)
        seen: set[int] = set()
        for site, module in self.modules:
            put_behind(model, site, module, self.rates.get(site.name))
            new = {id(p): p.numel() for p in module.parameters() if p.requires_grad and id(p) not in seen}
            seen |= new.keys()
            rows.append({"name": site.name, "shape": list(sizes_of(site)), "trained": sum(new.values())})
        for parameter, value in self.whole:
            with torch.no_grad():
                parameter.copy_(value)
            parameter.requires_grad_(True)
        declare_ties(model)
        totals = {
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "params": sum(p.numel() for p in model.parameters()),
            "missing": self.missing,
            "unexpected": self.unexpected,
            "others": self.others,
        }
        return Report(f"{title}: {len(rows)} layers adapted", rows, "layers", totals)


def _parts(matrix: StructuredMatrix) -> list[tuple[str, nn.Module]]:
    return list(matrix.named_modules(remove_duplicate=False))
