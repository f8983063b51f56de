"""Folders of Hugging Face PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``, without PEFT."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.adapted import adapted, in_use, whole_parameters
from ..core.files import read_json, write_text
from ..core.views import TransposedView, View
from ..matrices import Base, StructuredMatrix
from .adapter_folder import NONE, AdapterFolder
from .bases import NAME as BASES
from .bases import is_record, record_of, write_bases
from .model_files import verify
from .peft_experts import Experts, experts_of, joined, parted, target_parameters, targeted
from .peft_kinds import KINDS, LoraKind, PeftKind, Piece, Settings
from .peft_tasks import task_of

NAME = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
PREFIX = "base_model.model."
ALPHA = 8  # where a description names none
UNTOUCHED = (True, None, "gaussian", "orthogonal", "eva")  # starts for which PEFT leaves the base as it is
SHARED = (  # fields that are read for all kinds, or that change nothing in what is computed
    *(
        "peft_type",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
    ),
    *("bias", "ensure_weight_tying", "init_lora_weights", "init_weights", "fan_in_fan_out", "inference_mode"),
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "peft_version", "eva_config"),
    *("megatron_core", "qalora_group_size", "runtime_config", "loftq_config"),
)
_NAMES = ("target_modules", "exclude_modules")  # a list of names, or one expression
_EXPRESSIONS = ("modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern")


def write_peft(model: nn.Module, folder: Path) -> None:
    """Fill a folder with the adapters of a model, and with the modules whose parameters train whole.

    Raises:
        ValueError: if PEFT cannot compute an adapter, or what was written does not read back the same.
    """
    matrices, layers = in_use(model), adapted(model)
    if not matrices:
        raise ValueError(NONE)
    views = {name: layers[name].view for name in matrices}
    kind, pieces, fields = chosen(
        {name: (matrix, views[name]) for name, matrix in matrices.items()}, experts_of(model)
    )
    write_pieces(model, views, kind, pieces, fields, folder, getattr(model, "name_or_path", None))
    write_bases(folder, {name: record_of(matrix) for name, matrix in matrices.items()})


def write_pieces(
    model: nn.Module,
    views: Mapping[str, View],
    kind: PeftKind,
    pieces: Mapping[str, Piece],
    fields: Mapping[str, Any],
    folder: Path,
    base: str | None,
) -> None:
    """Fill a folder with what :func:`chosen` returned, and with all else of a model that trains.

    Args:
        model: whose layers may have adapters or not; only what trains, and what stands beside that, needs values.
        views: of the adapted layers; matrices of 3-D parameters are passed over.
        kind: of adapter.
        pieces: of each layer, and of each 3-D parameter.
        fields: of the description, of the kind alone.
        folder: is made.
        base: where the model without adapters is, if that is known.
    """
    experts = {path: each for path, each in experts_of(model).items() if path in pieces}
    modules = modules_of(model, views)
    views = {name: view for name, view in views.items() if name in pieces}
    places = {path: each.place(experts) for path, each in experts.items()}
    tensors = pieces_as_tensors({places.get(name, name): piece for name, piece in pieces.items()})
    biases = biases_of(model, views)
    tensors |= {f"{PREFIX}{name}.base_layer.bias": bias.detach() for name, bias in biases.items()}
    tied = tied_to(model, modules)
    for path in (*modules, *tied):
        state = model.get_submodule(path).state_dict()
        tensors |= {f"{PREFIX}{path}.{name}": tensor for name, tensor in state.items()}
    if experts:
        names = [name for name, _ in model.named_parameters()]
        fields = {**fields, "target_parameters": target_parameters(set(experts), [*names, *experts_of(model)])}
    config = description(
        kind,
        fields,
        target_modules=targets(set(views), [name for name, _ in model.named_modules()]),
        modules_to_save=modules or None,
        bias=kind.biases if biases else "none",
        fan_in_fan_out=any(isinstance(view, TransposedView) for view in views.values()),
        ensure_weight_tying=bool(tied),
        base_model_name_or_path=base or None,
        task_type=task_of(model, modules),
    )
    folder.mkdir(exist_ok=True)
    apart = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    save_file(apart, folder / TENSORS, metadata={"format": "pt"})
    verify(apart, folder)
    write_text(folder / NAME, json.dumps(config, indent=2, sort_keys=True) + "\n")


def chosen(
    layers: Mapping[str, tuple[StructuredMatrix, View]], experts: Mapping[str, Experts] | None = None
) -> tuple[PeftKind, dict[str, Piece], dict[str, Any]]:
    """Return the first kind that computes all layers, with what its file holds of each and its own fields.

    Args:
        layers: with adapters.
        experts: 3-D parameters; those of which layers are matrices have one piece each.

    Raises:
        ValueError: if there is none.
    """
    problem, experts = "", experts or {}
    inside = {name: each for each in experts.values() for name in each.slices if name in layers}
    for kind in KINDS:
        if inside and not isinstance(kind, LoraKind):
            continue
        pieces = {}
        for name, (matrix, view) in layers.items():
            piece = kind.piece(matrix, view)
            if piece is None:
                problem = f"layer {name}: its change is of no low rank, or PEFT does not know this kind of layer"
                break
            pieces[name] = piece
        else:
            for each in {each.path: each for each in inside.values()}.values():
                pieces[each.path] = joined(each, {n: pieces.pop(n) for n in each.slices if n in pieces})
            fields = kind.describe(pieces)
            if fields is not None:
                return kind, pieces, fields
            problem = "the layers differ in what PEFT has one setting for (kind of adapter, or dropout)"
    raise ValueError(f"{problem}; {_OTHERS}.")


_OTHERS = (
    "write format='rankwise', which holds everything, or rankwise.export that folder with "
    "exporters.Lora(base=..., rank=...), which truncates and reports the error, or with exporters.Merged"
)


def pieces_as_tensors(pieces: Mapping[str, Piece]) -> dict[str, Tensor]:
    """Return the tensors of all layers by their names in the file."""
    return {f"{PREFIX}{name}.{end}": t for name, piece in pieces.items() for end, t in piece.tensors.items()}


def description(kind: PeftKind, fields: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return what the file of the description holds; names in patterns become expressions for these alone."""
    made = {"peft_type": kind.name, "inference_mode": True, **more, **fields}
    for key in ("rank_pattern", "alpha_pattern"):
        if isinstance(made.get(key), Mapping) and kind.name != "ADALORA":
            made[key] = {f"^{re.escape(name)}": value for name, value in made[key].items()}
    return made


def targets(wanted: set[str], names: Iterable[str]) -> list[str] | str:
    """Return the shortest description of layers that PEFT finds these with, and no others."""
    names = list(names)
    short = sorted({name.rpartition(".")[2] for name in wanted})
    for candidate in (short, sorted(wanted)):
        if {name for name in names if _matches(candidate, name)} == wanted:
            return candidate
    return "|".join(re.escape(name) for name in sorted(wanted))


class PeftFolder(AdapterFolder):
    """A folder that PEFT or :func:`write_peft` wrote."""

    def __init__(self, folder: Path) -> None:
        if (folder / PICKLED).is_file() and not (folder / TENSORS).is_file():
            raise ValueError(
                f"{folder / PICKLED} is of an older PEFT, and is not unpickled; load it with PEFT and save it "
                f"again, which writes {TENSORS}."
            )
        super().__init__(folder / NAME, folder / TENSORS)
        self._bases = _records(folder / BASES)
        found = self.config.get("peft_type")
        known = {kind.name: kind for kind in KINDS}
        if found not in known:
            raise ValueError(f"{folder / NAME} is of type {found!r}; only {', '.join(sorted(known))} are read.")
        self.kind = known[found]
        for name, value in self.config.items():
            if value and name not in (*SHARED, *self.kind.fields):
                raise ValueError(f"{folder / NAME} asks for {name} = {str(value)[:60]}, which is not supported.")
        self._check_expressions(folder / NAME)
        start = self.config.get("init_lora_weights", True)
        if start not in UNTOUCHED and start is not False:
            raise ValueError(
                f"{folder / NAME} has the start {start!r}, for which PEFT changes the base itself; write it "
                "again with path_initial_model_for_weight_conversion, which makes it an ordinary LoRA."
            )
        self._experts: dict[str, tuple[Experts, str, int]] = {}  # of each slice, where its tensors are
        self._slices: set[str] = set()
        self._parts: dict[str, dict[str, str]] = {}
        for key in self.tensors:
            for end in self.kind.ends:
                if key.startswith(PREFIX) and key.endswith(f".{end}"):
                    self._parts.setdefault(key.removeprefix(PREFIX).removesuffix(f".{end}"), {})[end] = key

    def _check_expressions(self, file: Path) -> None:
        """Raise unless what names layers is names, or expressions that can be matched."""
        for key in (*_NAMES, *_EXPRESSIONS):
            found = self.config.get(key) or ()
            every = [found] if isinstance(found, str) else found
            if not isinstance(every, (list, dict, tuple)) or not all(isinstance(each, str) for each in every):
                raise ValueError(f"{file} has {key} = {str(found)[:60]}, which must be names; get it again.")
            if key in _NAMES and not isinstance(found, str):
                continue
            for each in every:
                try:
                    re.compile(each)
                except re.error as error:
                    raise ValueError(
                        f"{file} has {key} = {each!r}, which is no regular expression ({error}); correct it."
                    ) from error

    def prepare(self, model: nn.Module) -> None:
        """Find the 3-D parameters that the description names."""
        every = experts_of(model)
        found = targeted(every, self.config.get("target_parameters") or ())
        self._slices = {name for each in every.values() for name in each.slices}
        for each in found.values():
            place = each.place(found)
            self._experts |= {name: (each, place, i) for i, name in enumerate(each.slices)}

    @property
    def layers(self) -> list[str]:
        """Those of which there is a tensor."""
        places = {place for _, place, _ in self._experts.values()}
        return [name for name in self._parts if name not in places]

    def wanted(self, names: Iterable[str], head: str | None) -> list[str]:
        """Those that the description matches."""
        wanted, excluded = (self.config.get(key) or () for key in ("target_modules", "exclude_modules"))
        saved = self.config.get("modules_to_save") or ()
        names = [name for name in names if name not in self._slices]
        found = names if wanted == "all-linear" else [name for name in names if _matches(wanted, name)]
        found = [name for name in found if not (wanted == "all-linear" and name == head)]
        found = [name for name in found if not _matches(excluded, name)]
        found = [name for name in found if not any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in saved)]
        found = found if isinstance(wanted, str) else [name for name in found if self._in_layers(name)]
        return [*found, *self._experts]

    def _in_layers(self, name: str) -> bool:
        """Whether a layer stands in a block whose number is asked for."""
        numbers = self.config.get("layers_to_transform")
        if numbers is None or numbers == []:
            return True
        patterns = self.config.get("layers_pattern") or r"[^.]*"
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if found := re.match(rf"(?:.*?\.)?{pattern}\.(\d+)\.", name):
                return int(found[1]) in ([numbers] if isinstance(numbers, int) else numbers)
        return False

    @property
    def unties(self) -> bool:
        """PEFT trains a copy of a module, unless it is told to tie it."""
        return not self.config.get("ensure_weight_tying")

    def named(self, key: str) -> str:
        """Without PEFT's prefix; what is under an adapter stands one level deeper there."""
        return key.removeprefix(PREFIX).replace(".base_layer.", ".")

    @property
    def whole(self) -> Mapping[str, str]:
        """Parameters of the modules that are saved, at any depth, and biases."""
        found = {}
        modules = tuple(self.config.get("modules_to_save") or ())
        for key in self.tensors:
            name = self.named(key)
            if any(path.endswith(modules) for path in _owners(name)) or (
                self.config.get("bias", "none") != "none" and name.endswith("bias")
            ):
                found[name] = key
        return found

    def matrix(self, name: str, base: StructuredMatrix, view: View) -> StructuredMatrix | None:
        """Take the tensors of a layer, and build its expression."""
        if name in self._bases:
            self.check_base(name, base, self._bases[name])
        experts, place, i = self._experts.get(name, (None, name, 0))
        keys, found = self._parts.get(place, {}), {}
        for end in self.kind.ends:
            if end in keys or end in self.kind.needed(view):
                found[end] = self.take(keys.get(end, f"{PREFIX}{place}.{end}"))
        tensors = {end: _wide(tensor, base) for end, tensor in found.items() if tensor is not None}
        if len(tensors) < len(found) or not all(tensor.numel() for tensor in tensors.values()):
            return None
        path = name if experts is None else experts.path
        rank = _of_pattern(self.config.get("rank_pattern"), path, self.config.get("r", self.kind.rank))
        alpha = _of_pattern(self.config.get("alpha_pattern"), path, self.config.get(self.kind.alpha, ALPHA))
        try:
            if experts is not None:
                tensors = parted(experts, tensors, i)
            return self.kind.matrix(Base(base), tensors, Settings(self.config, rank, alpha), view)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"layer {name} in {self.folder} does not fit the model's: {_one_line(error)}"
            ) from error


def _records(file: Path) -> dict[str, Any]:
    """Read of which bases the layers are; PEFT itself does not write it."""
    found = read_json(file) if file.is_file() else {}
    for name, record in found.items():
        if not is_record(record):
            raise ValueError(f"{file} holds a damaged entry {str(record)[:80]!r} of {name}; get it again.")
    return found


def _matches(wanted: Any, name: str) -> bool:
    """Whether PEFT takes a name for one of those that a description lists or matches."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == each or name.endswith(f".{each}") for each in wanted)


def _owners(name: str) -> list[str]:
    """Return the paths of the modules that a parameter stands in, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def _of_pattern(pattern: Any, name: str, usual: Any) -> Any:
    """Return what the first expression that matches a name says, as PEFT does."""
    for expression, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({expression})$", name):
            return value
    return usual


def _wide(tensor: Tensor, base: StructuredMatrix) -> Tensor:
    return tensor.to(
        base.device, torch.promote_types(tensor.dtype, torch.promote_types(base.dtype, torch.float32))
    )


def biases_of(model: nn.Module, layers: Iterable[str]) -> dict[str, Tensor]:
    """Return the biases of adapted layers, if one of them trains."""
    found: dict[str, Any] = {name: getattr(model.get_submodule(name), "bias", None) for name in layers}
    own = {name: bias for name, bias in found.items() if bias is not None}
    return own if any(bias.requires_grad for bias in own.values()) else {}


def modules_of(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Return the modules that hold the parameters which train whole, but for the biases of adapted layers."""
    layers = set(layers)
    names = [name for name in whole_parameters(model) if name.removesuffix(".bias") not in layers]
    paths = sorted({name.rpartition(".")[0] for name in names})
    for path in paths:
        if any(name.startswith(f"{path}.") for name in layers) or not path:
            raise ValueError(f"the module {path!r} trains in part and has adapters inside; {_OTHERS}.")
        if wrong := [name for name, _ in model.named_modules() if name.endswith(path) and name not in paths]:
            raise ValueError(f"PEFT would take {wrong[0]} for {path}, which trains whole; {_OTHERS}.")
    return paths


def tied_to(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Return the other modules that share a parameter with one of these."""
    paths = set(paths)
    own = {id(p) for path in paths for p in model.get_submodule(path).parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return sorted({name.rpartition(".")[0] for name, p in every if id(p) in own} - paths)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
