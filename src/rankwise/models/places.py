"""Where in a model the tensors of its files go, whatever names they have there."""

import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..core.stacks import stacks
from .model_files import tensors_of

Shape = tuple[int, ...]


def places_of(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Return the tensor of a model, or the first of several, that each tensor of its files becomes.

    Names that mean nothing to the model are their own places.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules, state, prefix = get_model_conversion_mapping(model), model.state_dict(), model.base_model_prefix
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    places = {}
    for name in names:
        places[name], _ = rename_source_key(name, renamings, converters, prefix, state)
        if places[name] not in state and name in state:
            places[name], _ = rename_source_key(name, [], [], prefix, state)
    return places


def used_names(model: Any, stored: Mapping[str, Shape], folder: Path) -> list[str]:
    """Return the names in the files of a model that mean something to it, and warn of the others.

    Args:
        model: on the meta device, with its structured layers.
        stored: the shape of each tensor in its files, under any name by which transformers loads it.
        folder: of the files.

    Raises:
        ValueError: if not every place of the model has all tensors, and of the shapes, that it would write.
    """
    needed = _at_places(model, {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()})
    found = _at_places(model, stored)
    known = model.state_dict().keys() | {path for path, _ in stacks(model)}
    used = [name for name, place in places_of(model, stored).items() if place in known]
    names = SimpleNamespace(missing_keys=needed.keys() - found.keys(), unexpected_keys=stored.keys() - set(used))
    model._adjust_missing_and_unexpected_keys(names)  # by those that its kind may lack, or had in older files
    if missing := sorted(names.missing_keys):
        raise ValueError(
            f"{missing[0]} is not in the checkpoint, as {len(missing)} of the model's tensors in all."
        )
    for place in sorted(needed.keys() & found.keys()):
        if len(found[place]) < len(needed[place]):
            raise ValueError(
                f"only {len(found[place])} of {len(needed[place])} tensors of {place} are in the checkpoint."
            )
        for shape in Counter(needed[place]) - Counter(found[place]):
            raise ValueError(f"{place} is {found[place][0]} in the checkpoint, but {shape} in the model.")
    if names.unexpected_keys:
        warnings.warn(unread_words(folder, names.unexpected_keys), stacklevel=3)
    return used


def unread_words(folder: Path, names: Collection[str]) -> str:
    """Say which tensors of a folder have no place in its model."""
    shown = ", ".join(sorted(names)[:3])
    return f"{len(names)} tensors of {folder} are not used: {shown}{' ...' if len(names) > 3 else '.'}"


def _at_places(model: Any, shapes: Mapping[str, Shape]) -> dict[str, list[Shape]]:
    """Return the shapes of the tensors that come to each place of a model; tied ones come to one."""
    found: dict[str, list[Shape]] = {}
    for name, place in places_of(model, shapes).items():
        found.setdefault(model.all_tied_weights_keys.get(place, place), []).append(shapes[name])
    return found
