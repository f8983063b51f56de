"""Give a model of transformers other sizes, in place: parameters, and numbers of modules and config."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..core.labels import features_of
from ..core.statistics import Batch
from ..core.watch import call_of
from .causal import evaluating
from .quiet import quiet

Path = tuple[str, ...]  # of a field in a config, which may hold other configs
Numbers = Mapping[Path, int]

ABSENT = object()


class Exchange:
    """New values and sizes of parameters, with the numbers in modules and config that go with them.

    What transformers builds from the new config says which numbers of which modules change.

    Args:
        model: of transformers.
        numbers: fields of its config.
        tensors: the new values, by the names of the parameters.

    Raises:
        ValueError: if transformers would build a model with other shapes from these numbers.
    """

    def __init__(self, model: Any, numbers: Numbers, tensors: Mapping[str, Tensor]) -> None:
        old, new = built(model, {}), built(model, numbers)
        live = parameters_of(model)
        shapes = {name: tensors.get(name, parameter).shape for name, parameter in live.items()}
        shapes |= {name: buffer.shape for name, buffer in model.named_buffers()}
        wanted = shapes_of(new) | {name: buffer.shape for name, buffer in new.named_buffers()}
        for name in shapes | wanted:
            if shapes.get(name) != wanted.get(name):
                words = ", ".join(f"{path[-1]} = {value}" for path, value in numbers.items())
                raise ValueError(f"{name}: {words} asks for {wanted.get(name)}, but it is {shapes.get(name)}.")
        self._changes: list[tuple[dict[str, Any], str, Any]] = []
        made: dict[int, nn.Parameter] = {}  # shared parameters stay shared
        for name, tensor in tensors.items():
            own = live[name]
            value = nn.Parameter(tensor.to(own.device, own.dtype).contiguous(), own.requires_grad)
            path, _, last = name.rpartition(".")
            self._changes.append((model.get_submodule(path)._parameters, last, made.setdefault(id(own), value)))
        for path, module in new.named_modules():
            before, place = vars(old.get_submodule(path)), vars(model.get_submodule(path))
            for key, value in vars(module).items():
                if isinstance(value, (int, float)) and before.get(key) != value:
                    self._changes.append((place, key, value))
        held = [value for module in model.modules() for value in vars(module).values() if is_config(value)]
        parts = {id(part): part for config in held for _, part in configs_in(config)}.values()
        named = dict(configs_in(model.config))
        for path, value in numbers.items():
            target = named[path[:-1]]
            others = {id(part) for at, part in named.items() if at != path[:-1]}
            copies = [p for p in parts if type(p) is type(target) and id(p) not in others and same(p, target)]
            self._changes.extend((vars(part), path[-1], value) for part in copies)

    def apply(self) -> None:
        """Change the model; an interrupt on the way leaves it as it was."""
        before = self._values()
        try:
            _put(self._changes)
        except BaseException:
            _put(before)
            raise

    @contextlib.contextmanager
    def tried(self) -> Iterator[None]:
        """Change the model for a while."""
        before = self._values()
        try:
            _put(self._changes)
            yield
        finally:
            _put(before)

    def _values(self) -> list[tuple[dict[str, Any], str, Any]]:
        return [(place, key, place.get(key, ABSENT)) for place, key, _ in self._changes]


def same_outputs(model: nn.Module, batch: Batch, exchange: Exchange, values: Mapping[str, Tensor]) -> bool:
    """Whether a model computes after an exchange what it computes before with other values of some parameters.

    Two outputs are the same if they differ by less than the square root of their type's rounding error.

    Args:
        model: as it is before; it is not changed.
        batch: what it takes.
        exchange: the change of sizes.
        values: of parameters, in the sizes of before.
    """
    limit = torch.finfo(next(model.parameters()).dtype).eps ** 0.5
    wanted = outputs_of(model, batch, values)
    with exchange.tried():
        found = outputs_of(model, batch, {})
    return all(
        a.shape == b.shape and float((a - b).norm()) <= limit * float(b.norm())
        for a, b in zip(found, wanted, strict=True)
    )


def outputs_of(model: nn.Module, batch: Batch, values: Mapping[str, Tensor]) -> list[Tensor]:
    """Return all floating-point outputs of a model for a batch, with other values of some parameters."""
    arguments, options = call_of(batch, next(model.parameters()).device)
    with evaluating(model):
        return features_of(functional_call(model, dict(values), tuple(arguments), options), batch)


def built(model: Any, numbers: Numbers, config: Any = None) -> Any:
    """Build a model of the same class without values, with other numbers in its config."""
    config = copy.deepcopy(model.config if config is None else config)
    parts = dict(configs_in(config))
    for path, value in numbers.items():
        vars(parts[path[:-1]])[path[-1]] = value
    with quiet(), torch.device("meta"):
        return type(model)(config)


def readable(model: Any, numbers: Numbers) -> bool:
    """Whether transformers reads a config with these numbers from a file, and builds the same model from it."""
    made = built(model, numbers)
    try:
        config = type(made.config).from_dict(made.config.to_dict())
        return shapes_of(built(model, {}, config)) == shapes_of(made)
    except Exception:  # each family refuses numbers in its own way
        return False


def configs_in(config: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield a config and those inside it, with their paths."""
    yield path, config
    for name, value in vars(config).items():
        if is_config(value):
            yield from configs_in(value, (*path, name))


def same(config: Any, other: Any) -> bool:
    """Whether two configs are one, or one a copy of the other that a module keeps."""
    return config is other or config.to_dict() == other.to_dict()


def is_config(value: Any) -> bool:
    """Whether something is a config of transformers."""
    from transformers import PretrainedConfig

    return isinstance(value, PretrainedConfig)


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a model by all their names."""
    return dict(model.named_parameters(remove_duplicate=False))


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of a model's parameters by all their names."""
    return {name: parameter.shape for name, parameter in parameters_of(model).items()}


def _put(changes: list[tuple[dict[str, Any], str, Any]]) -> None:
    for place, key, value in changes:
        if value is ABSENT:
            place.pop(key, None)
        else:
            place[key] = value
