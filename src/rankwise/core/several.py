"""Adapters with names: how they come into a model, which are in use, and how they go."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn

from ..matrices import Base, Dense, Scheduled, Several, StructuredMatrix
from ..matrices.several import Rows, Weights, is_weights
from .extended import refuse_extended
from .surgery import Site, StructuredLinear, base_of, replace, restack, set_module, structured, take_hooks
from .ties import declare_ties
from .views import SliceView

Chosen = str | Weights | None
Choice = Chosen | Sequence[Chosen]
CHOICES = "an adapter is chosen by its name, by weights by name, or None"


def layers_with(model: nn.Module) -> dict[str, Several]:
    """Return the layers that adapters with names can stand in, by name."""
    found = structured(model).items()
    return {name: layer.matrix for name, layer in found if isinstance(layer.matrix, Several)}


def scheduled(model: nn.Module) -> dict[str, Scheduled]:
    """Return the matrices that train by a schedule, by name, but for those of adapters that are not in use."""
    idle = {id(part) for several in layers_with(model).values() for part in several.idle()}
    found = model.named_modules()
    return {name: part for name, part in found if isinstance(part, Scheduled) and id(part) not in idle}


def check_one(model: nn.Module) -> None:
    """Raise ValueError if each row of a batch has its own adapter."""
    for several in layers_with(model).values():
        several.check_one()


def named(model: nn.Module) -> dict[str, list[str]]:
    """Return the names of the adapters of a model, each with its layers."""
    found: dict[str, list[str]] = {}
    for layer, several in layers_with(model).items():
        for name in several.names:
            found.setdefault(name, []).append(layer)
    return found


def check_name(model: nn.Module, name: str | None) -> None:
    """Raise ValueError unless an adapter can come into a model under a name, or without one."""
    known = named(model)
    if name is None:
        if known:
            raise ValueError(f"the model has adapters with names, {_list(known)}; give this one a name, too.")
        return
    if not isinstance(name, str) or not name:
        raise ValueError(f"name must be a word, got {name!r}.")
    if name in known:
        raise ValueError(f"the model has an adapter {name!r} already; remove that first, or give another name.")
    for path, layer in structured(model).items():
        if not isinstance(layer.matrix, Several) and base_of(layer.matrix) is not None:
            raise ValueError(f"layer {path} has an adapter without a name; fold it first, or name that one, too.")
    refuse_extended(model, "cannot be switched off")


def join(model: nn.Module, site: Site, name: str, expression: StructuredMatrix, lr: float | None) -> None:
    """Put an adapter of a site's base under a name, not in use yet; ``lr`` is the rate that it suggests."""
    layer = site.layer
    if isinstance(layer, StructuredLinear) and isinstance(layer.matrix, Several):
        layer.matrix.add(name, expression, lr)
    else:
        base = next(part for part in expression.modules() if isinstance(part, Base))
        several = Several(Base(base.matrix), {})
        several.add(name, expression, lr)
        replace(model, site, several)


def drop(model: nn.Module, name: str) -> None:
    """Take an adapter away that is not in use; a layer that has no other is what it was."""
    plain: dict[int, nn.Module] = {}
    for path in layers_with(model):
        forget(model, path, name, plain)
    restack(model)
    declare_ties(model)


def forget(model: nn.Module, path: str, name: str, plain: dict[int, nn.Module]) -> None:
    """Take an adapter off a layer, which is what it was if it has no other; ``plain`` as in :func:`take_off`."""
    several = model.get_submodule(path).get_submodule("matrix")
    assert isinstance(several, Several)
    if name in several.names:  # layers may share it
        several.remove(name)
    if not several.names:
        take_off(model, path, several.base, plain)


def take_off(model: nn.Module, path: str, base: Base, plain: dict[int, nn.Module]) -> None:
    """Give a layer its base back, as an ordinary layer where that is dense; ``plain`` has those made before."""
    layer = model.get_submodule(path)
    assert isinstance(layer, StructuredLinear)
    layer.matrix = base.matrix
    if isinstance(base.matrix, Dense):
        new = layer.dense().train(layer.training)  # with its own bias, which may train
        first = plain.setdefault(id(base), new)
        new.weight = first.get_parameter("weight").requires_grad_(False)
        take_hooks(layer, new)
        set_module(model, path, new)


def choose(model: nn.Module, choice: Choice) -> None:
    """Have adapters in use: see :func:`rankwise.use`."""
    found, known = layers_with(model), named(model)
    if not found:
        raise ValueError("the model has no adapters with names; give load_adapter or adapt a name.")
    if choice is None or isinstance(choice, (str, Mapping)):
        put(model, dict.fromkeys(found, _weights(choice, known)))
        return
    if not isinstance(choice, Sequence):
        raise ValueError(f"{CHOICES}, or a sequence of these, one for each row; got {choice!r}.")
    rows = [_weights(each, known) for each in choice]
    if not rows:
        raise ValueError("there is no row: give a name, weights or None for each row of the batch.")
    wanted = {name for row in rows for name in row}
    for path, several in found.items():
        if isinstance(model.get_submodule(path).view, SliceView) and wanted.intersection(several.names):
            raise ValueError(
                f"layer {path} is an expert, whose inputs are tokens of any row: no row can choose an adapter. "
                "Run the rows of each adapter in a batch of their own."
            )
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    one, other = Rows(rows), Rows(rows, flat=False)  # of lists in lists, the inner ones may be experts
    inside = {path: sum(path.startswith(f"{each}.") for each in lists) > 1 for path in found}
    put(model, {path: other if inside[path] else one for path in found})


def chosen(model: nn.Module) -> dict[str, Weights | Rows]:
    """Return what is in use in each layer."""
    return {path: several.choice for path, several in layers_with(model).items()}


def put(model: nn.Module, choices: Mapping[str, Weights | Rows]) -> None:
    """Have other adapters in use, in all layers at once: what trains may be shared between them."""
    found = layers_with(model)
    for several in found.values():
        several.remember()
    for path, several in found.items():
        several.use(choices.get(path, {}))


@contextlib.contextmanager
def used(model: nn.Module, choice: Choice) -> Iterator[None]:
    """Have adapters in use for a while; without any with names do nothing for None."""
    before = chosen(model)
    if before or choice is not None:
        choose(model, choice)
    try:
        yield
    finally:
        put(model, before)


def _weights(choice: Chosen, known: Mapping[str, object]) -> Weights:
    if choice is None:
        return {}
    weights = {choice: 1.0} if isinstance(choice, str) else choice
    if not is_weights(weights):
        raise ValueError(f"{CHOICES}; got {choice!r}.")
    for name in weights:
        _check(name, known)
    return {name: float(weight) for name, weight in weights.items() if weight}


def check_known(model: nn.Module, name: str) -> None:
    """Raise ValueError unless a model has an adapter of this name."""
    _check(name, named(model))


def _check(name: str, known: Mapping[str, object]) -> None:
    if name not in known:
        raise ValueError(f"the model has no adapter {name!r}; it has {_list(known) or 'none with a name'}.")


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
