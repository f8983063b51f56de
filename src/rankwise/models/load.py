"""Load a model by folder, hub id, GGUF file or embedded name."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..core.spelling import meant
from .embedded import EMBEDDED, embedded_folder
from .gguf import from_gguf
from .model_folder import BESIDE, weight_files
from .places import unread_words
from .quantizer import register_when_ready
from .quiet import quiet

_TOKENIZERS = ("tokenizer*", "vocab.*", "spiece.model", "sentencepiece*", "*.tiktoken")


def load(
    source: str | Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """Load a model and its tokenizer, compressed or not.

    Args:
        source: an embedded model (``smollm2-135m``, ``minilm-l6``), a folder, a ``.gguf`` file, or a hub id
            (``organisation/name``), tried in this order.
        dtype: of the weights; None keeps those of the checkpoint (float32 for a GGUF file).
        trust_remote_code: run code that comes with a hub model. Weights are never unpickled.

    Returns:
        the model in evaluation mode, of the class that the checkpoint names, and the tokenizer, or None if
        there is none.

    Raises:
        TypeError: if ``dtype`` is no floating-point ``torch.dtype``.
        ValueError: if there is no such model, or its files are damaged or incomplete.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype or None, got {dtype!r}.")
    folder = find(source, trust_remote_code)
    if folder.is_file():
        return from_gguf(folder, dtype or torch.float32)
    weight_files(folder)
    register_when_ready()
    try:
        with quiet():
            return _model(folder, dtype, trust_remote_code), tokenizer_of(folder, trust_remote_code)
    except Exception as error:  # what transformers raises is of any kind and many lines
        raise ValueError(f"{source} cannot be loaded: {_one_line(error)}") from error


def load_tokenizer(source: str | Path) -> Any:
    """Load the tokenizer of a model alone, or return None if there is none.

    Raises:
        ValueError: if there is no such model, or it is a GGUF file.
    """
    folder = find(source, trust=False)
    if folder.is_file():
        raise ValueError(f"{source} is one GGUF file; give a folder.")
    with quiet():
        return tokenizer_of(folder, trust=False)


def find(source: str | Path, trust: bool = False) -> Path:
    """Return the folder or the GGUF file that a source stands for."""
    name, path = str(source), Path(source).expanduser()
    if name in EMBEDDED:
        return embedded_folder(name)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    accepted = f"give a folder, a .gguf file, a hub id (organisation/name), or one of {', '.join(EMBEDDED)}"
    if path.is_file():
        raise ValueError(f"{name} is a file that cannot be read as a model; {accepted}.")
    if not is_hub_id(name):
        raise ValueError(f"{name} does not exist; {meant(name, EMBEDDED)}{accepted}.")
    return _from_hub(name, trust)


def is_hub_id(name: str) -> bool:
    """Whether a name has the form organisation/name.

    >>> is_hub_id("organisation/name"), is_hub_id("./folder/name"), is_hub_id("some/model.gguf")
    (True, False, False)
    """
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None and Path(name).suffix != ".gguf"


def _from_hub(name: str, trust: bool) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", *BESIDE, *(["*.py"] if trust else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*", "consolidated*"]))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} does not exist here, and could not be had from the hub: {_one_line(error)}"
        ) from error


def _model(folder: Path, dtype: torch.dtype | None, trust: bool) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    model, found = kind_of(config).from_pretrained(
        folder,
        config=config,
        dtype=dtype or "auto",
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # they are an error below, with their names
        output_loading_info=True,
        **({"trust_remote_code": True} if trust else {}),
    )
    if found["mismatched_keys"]:
        name, stored, wanted = min(found["mismatched_keys"])
        raise ValueError(f"{name} is {tuple(stored)} in the checkpoint, but {tuple(wanted)} in the model.")
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ValueError(
            f"{missing[0]} is not in the checkpoint, as {len(missing)} of the model's tensors in all."
        )
    if found["unexpected_keys"]:
        warnings.warn(unread_words(folder, found["unexpected_keys"]), stacklevel=3)
    return model.eval()


def config_from(data: Mapping[str, Any]) -> Any:
    """Make a config from what ``config.json`` holds, where infinities are written as words.

    Raises:
        ValueError: if transformers does not know the kind of model, or takes a value for none.
    """
    from transformers import AutoConfig

    if not isinstance(kind := data.get("model_type"), str):
        raise ValueError(f"model_type must be the name of a kind of model, got {kind!r}; get the file again.")
    try:
        return AutoConfig.for_model(**{name: _with_infinities(value) for name, value in data.items()})
    except Exception as error:  # what transformers raises is of any kind and many lines
        raise ValueError(_one_line(error)) from error


def _with_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        word = value.get("__float__")
        return {k: _with_infinities(v) for k, v in value.items()} if word is None else float(word)
    return [_with_infinities(each) for each in value] if isinstance(value, list) else value


def kind_of(config: Any) -> Any:
    """Return the class that a config names, or the automatic one that fits best."""
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

    name = (config.architectures or [""])[0]
    named = getattr(transformers, name, None)
    if isinstance(named, type) and issubclass(named, PreTrainedModel):
        return named
    return AutoModelForCausalLM if name.endswith(("ForCausalLM", "LMHeadModel")) else AutoModel


def without_values(config: Any, dtype: torch.dtype | None = None) -> Any:
    """Return the model of a config, whose tensors are on the meta device.

    Raises:
        ValueError: if no model can be made of it.
    """
    try:
        with quiet(), torch.device("meta"):
            kind = kind_of(config)
            build = kind._from_config if hasattr(kind, "_from_config") else kind.from_config
            return build(config, **({} if dtype is None else {"dtype": dtype}))
    except Exception as error:  # what transformers raises is of any kind
        raise ValueError(f"no model can be made of the config: {_one_line(error)}") from error


def tokenizer_of(folder: Path, trust: bool = False) -> Any:
    """Return the tokenizer, or None if there are no files of one; transformers would then make an empty one."""
    from transformers import AutoTokenizer

    if not any(next(folder.glob(pattern), None) for pattern in _TOKENIZERS):
        return None
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."
