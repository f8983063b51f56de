"""From the words of a command line to methods, layers and numbers; every error names the flag."""

import contextlib
import dataclasses
import difflib
import inspect
import re
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn

from .. import initialisers, optimizers, projectors, rank_rules
from ..core.methods import Initialiser, RankRule
from ..core.spelling import meant
from ..core.subspaces import Carry, Projector, Refresh
from ..core.surgery import Where, select
from ..core.transforms import Transform
from ..linalg import Sharing, exact, expanded, reduced
from ..optimizers import retractions
from ..optimizers.retractions import Retraction

PARTS: dict[type, types.ModuleType] = {
    Carry: projectors,
    Initialiser: initialisers,
    Projector: projectors,
    RankRule: rank_rules,
    Refresh: projectors,
    Retraction: retractions,
    Transform: optimizers,
}
"""Kinds of methods that are fields of other methods, and where they are."""
NAMED: dict[Any, dict[str, Any]] = {
    Sharing: {"exact": exact, "expanded": expanded, "reduced": reduced},
    torch.dtype: {"bfloat16": torch.bfloat16, "float32": torch.float32},
}
"""Kinds of values that have names; other functions have no form in words."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """A field of a method, or an argument of a recipe.

    Args:
        name: as in Python.
        kind: its type.
        default: what stands for it, or ``inspect.Parameter.empty``.
    """

    name: str
    kind: Any
    default: Any


def command_name(name: str) -> str:
    """Turn a Python name into the one used on the command line.

    >>> command_name("KroneckerFactoredSvd"), command_name("water_filling")
    ('kronecker-factored-svd', 'water-filling')
    """
    return re.sub(r"(?<!^)(?=[A-Z])", "-", name).lower().replace("_", "-")


def registry(package: types.ModuleType) -> dict[str, Any]:
    """Return everything that a method package exports, by its name on the command line."""
    return {command_name(name): getattr(package, name) for name in package.__all__}


def pick(flag: str, name: str, known: Mapping[str, Any]) -> Any:
    """Return an entry by name, of which hyphens may be left out or be underscores.

    Raises:
        ValueError: if there is none; the message names the nearest and all others.
    """
    if (full := _full_name(name, known)) is not None:
        return known[full]
    raise ValueError(f"{flag}: unknown {name!r}; {meant(name, known)}known: {', '.join(known)}.")


def build_mix(names: str, known: Mapping[str, Any], settings: Sequence[str], mix: Callable[..., Any]) -> Any:
    """Make a method from its name, or a mix of several from ``name+name``.

    Args:
        names: one or several keys of ``known``.
        known: methods by name.
        settings: ``field=value`` words; each goes to all the methods that have the field.
        mix: makes one method of several.

    Raises:
        ValueError: if a name is unknown, or a setting is wrong or fits no method.
    """
    kinds = [pick("--method", name, known) for name in names.split("+")]
    if len(kinds) == 1:
        return build(kinds[0], settings)
    fields = [{field.name for field in settable(kind)} for kind in kinds]
    named = [(setting.partition("=")[0].replace("-", "_"), setting) for setting in settings]
    for name, setting in named:
        if not any(name in each for each in fields):
            raise ValueError(f"--set: none of {names} has a field {name!r} as in {setting!r}; see rankwise list.")
    parts = zip(kinds, fields, strict=True)
    return mix(methods=tuple(build(kind, [word for name, word in named if name in each]) for kind, each in parts))


def build(kind: Callable[..., Any], settings: Sequence[str], flag: str = "--set") -> Any:
    """Make a method from ``field=value`` words.

    Args:
        kind: a dataclass, or a recipe with named arguments, whose fields are of type bool, int, float, str or
            Literal, or hold a method of PARTS.
        settings: each field at most once.
        flag: what errors name.

    Raises:
        ValueError: if a field is unknown, missing, given twice, or its value does not fit.
    """
    known = {field.name: field.kind for field in settable(kind)}
    listing = "; ".join(describe(kind)) or "none"
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.replace("-", "_")
        if not equals:
            raise ValueError(f"{flag} takes field=value, got {setting!r}; fields of {kind.__name__}: {listing}.")
        if name not in known:
            hint = meant(name, known)
            raise ValueError(f"{flag}: {kind.__name__} has no field {name!r}; {hint}its fields: {listing}.")
        if name in values:
            raise ValueError(f"{flag}: {name} is given twice; give it once.")
        try:
            values[name] = parse(known[name], text)
        except ValueError as error:
            raise ValueError(f"{flag} {name}: {error}; fields of {kind.__name__}: {listing}.") from error
    for field in settable(kind):
        if field.default is inspect.Parameter.empty and field.name not in values:
            raise ValueError(f"{flag} {field.name}=... is needed; fields of {kind.__name__}: {listing}.")
    return kind(**values)


def describe(kind: Callable[..., Any]) -> list[str]:
    """Return ``name: type = default`` for each field of a dataclass, or argument of a recipe."""
    return [f"{field.name}: {_type_name(field.kind)}{_default(field.default)}" for field in settable(kind)]


def settable(kind: Callable[..., Any]) -> list[Setting]:
    """Return the fields of a dataclass, or arguments of a recipe, that have a form in words.

    Functions have none, nor have several methods, or several tuples.
    """
    hints = get_type_hints(kind)
    if dataclasses.is_dataclass(kind):
        found = [Setting(field.name, hints[field.name], _made(field)) for field in dataclasses.fields(kind)]
    else:
        arguments = inspect.signature(kind).parameters.values()
        found = [Setting(each.name, hints[each.name], each.default) for each in arguments]
    return [field for field in found if _has_words(field.kind)]


def parse(kind: Any, text: str) -> Any:
    """Read a value of a type.

    >>> parse(float, "1e-3"), parse(bool, "no"), parse(Literal["pivot", "factors"], "pivot")
    (0.001, False, 'pivot')
    >>> parse(int | float, "0.25"), parse(int | Refresh, "50"), parse(tuple[float, float], "0.9,0.95")
    (0.25, 50, (0.9, 0.95))
    """
    if get_origin(kind) is Literal:
        options = get_args(kind)
        found = [option for option in options if str(option) == text]
        if not found:
            raise ValueError(_one_of([*map(str, options)], text))
        return found[0]
    if get_origin(kind) in (Union, types.UnionType):
        if text.lower() == "none" and type(None) in get_args(kind):
            return None
        options = [option for option in get_args(kind) if option is not type(None) and _has_words(option)]
        for option in options[:-1]:
            with contextlib.suppress(ValueError):
                return parse(option, text)
        try:
            return parse(options[-1], text)
        except ValueError as error:
            raise (
                error if len(options) == 1 else ValueError(f"must be {_type_name(kind)}, got {text!r}")
            ) from None
    if get_origin(kind) is tuple:
        kinds, words = get_args(kind), text.split(",")
        if len(words) != len(kinds):
            raise ValueError(f"must be {_type_name(kind)}, got {text!r}")
        return tuple(parse(each, word) for each, word in zip(kinds, words, strict=True))
    if kind in PARTS or kind in NAMED:
        known = NAMED[kind] if kind in NAMED else _parts(kind)
        full = _full_name(text, known)
        if full is None:
            raise ValueError(_one_of([*known], text))
        return known[full] if kind in NAMED else known[full]()
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if text.lower() not in words:
            raise ValueError(f"must be true or false, got {text!r}")
        return words[text.lower()]
    if kind not in (int, float, str):
        raise TypeError(f"a field of type {kind} cannot be set from the command line; use Python.")
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"must be {_type_name(kind)}, got {text!r}") from error


def where_option(pattern: str | None, flag: str = "--where") -> Where | None:
    """Turn ``--where`` or the like into a predicate on names.

    Raises:
        ValueError: if it is not a regular expression.
    """
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{flag} is not a regular expression: {error}, got {pattern!r}.") from error

    def where(name: str, module: nn.Module) -> bool:
        return compiled.search(name) is not None

    return where


def check_matches(flag: str, pattern: str | None, names: Collection[str]) -> None:
    """Raise if a regular expression is given that fits none of the names."""
    if pattern is not None and not any(re.search(pattern, name) for name in names):
        close = difflib.get_close_matches(pattern, names, n=1, cutoff=0)
        raise ValueError(f"{flag} {pattern!r} fits no name in the model, where names are such as {close[0]}.")


def layer_names(model: nn.Module) -> list[str]:
    """Return the names of all matrices of a model, those of experts too."""
    sites = select(model, lambda *_: True, compressed=True, tables=True)
    return [name for site in sites.values() for name in site.names]


def duration(flag: str, text: str) -> float:
    """Read a time such as 90s, 10m or 1.5h, in seconds.

    >>> duration("--heal", "90s"), duration("--heal", "1.5h")
    (90.0, 5400.0)
    """
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if found is None or not float(found[1]) > 0:
        raise ValueError(f"{flag} takes a time such as 90s, 10m or 1h, got {text!r}.")
    return float(found[1]) * units[found[2]]


def only_with(needed: str, there: bool, given: Mapping[str, Any]) -> None:
    """Raise if flags are given that do nothing without another one."""
    for flag, value in given.items():
        if value is not None and not there:
            raise ValueError(f"{flag} needs {needed}.")


def at_least(flag: str, value: int | None, least: int) -> None:
    """Raise if a count is too small."""
    if value is not None and value < least:
        raise ValueError(f"{flag} must be at least {least}, got {value}.")


def _full_name(name: str, known: Collection[str]) -> str | None:
    """Return the one of the names that a name is, exactly or but for hyphens, which may be underscores."""
    return name if name in known else {_bare(each): each for each in known}.get(_bare(name))


def _bare(name: str) -> str:
    return name.replace("-", "").replace("_", "")


def _one_of(known: Sequence[str], text: str) -> str:
    return f"must be one of {', '.join(known)}, got {text!r}; {meant(text, known)}".removesuffix("; ").rstrip()


def _made(field: dataclasses.Field) -> Any:
    """Return the default of a field."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return ""
    if dataclasses.is_dataclass(value):
        return f" = {command_name(type(value).__name__)}"
    if inspect.isfunction(value):
        return f" = {value.__name__}"
    return f" = {','.join(map(str, value)) if isinstance(value, tuple) else value}"


def _has_words(kind: Any) -> bool:
    """Whether values of a type can be written as one word."""
    if get_origin(kind) is tuple:
        return all(each in (bool, int, float) for each in get_args(kind))
    return kind in NAMED or kind in PARTS or not (get_origin(kind) is Callable or dataclasses.is_dataclass(kind))


def _parts(kind: type) -> dict[str, Callable[[], Any]]:
    """Return what makes methods of a kind from nothing, by name."""
    return {name: made for name, made in registry(PARTS[kind]).items() if _makes(made, kind)}


def _makes(made: Callable[..., Any], kind: type) -> bool:
    if isinstance(made, type) and not issubclass(made, kind):
        return False
    return all(
        field.default is not inspect.Parameter.empty for field in inspect.signature(made).parameters.values()
    )


def _type_name(kind: Any) -> str:
    if kind in PARTS:
        return " | ".join(_parts(kind))
    if kind in NAMED:
        return " | ".join(NAMED[kind])
    if get_origin(kind) in (Union, types.UnionType):
        return " | ".join(
            "None" if each is type(None) else _type_name(each) for each in get_args(kind) if _has_words(each)
        )
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return ",".join(map(_type_name, get_args(kind)))
    return kind.__name__ if isinstance(kind, type) else str(kind)
