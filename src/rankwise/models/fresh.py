"""Language models to train from scratch: from a config of transformers, or from a few words."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..core.spelling import meant
from .load import find, is_hub_id
from .quiet import quiet

SHORT = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "intermediate": "intermediate_size",
    "vocab": "vocab_size",
    "window": "max_position_embeddings",
}
PRESETS = {  # the sizes of GaLore's experiments, arXiv 2403.03507
    "llama-60m": "llama:hidden=512,layers=8,heads=8,intermediate=1376,vocab=32000",
    "llama-130m": "llama:hidden=768,layers=12,heads=12,intermediate=2048,vocab=32000",
    "llama-350m": "llama:hidden=1024,layers=24,heads=16,intermediate=2736,vocab=32000",
    "llama-1b": "llama:hidden=2048,layers=24,heads=32,intermediate=5461,vocab=32000",
    "llama-7b": "llama:hidden=4096,layers=32,heads=32,intermediate=11008,vocab=32000",
}
END = "<|endoftext|>"
BYTES = 257  # and the end of text
WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")  # endings of files with weights


def is_config(source: str | Path) -> bool:
    """Whether a source is words or a file about a model without weights."""
    text, path = str(source), Path(source).expanduser()
    if text in PRESETS or (not path.exists() and ":" in text):
        return True
    return path.suffix == ".json" or (path.is_dir() and not any(any(path.glob(f"*{end}")) for end in WEIGHTS))


def check_preset(source: str | Path) -> None:
    """Raise if a source is nothing that there is, but nearly a preset."""
    name = str(source)
    if name not in PRESETS and not Path(name).expanduser().exists() and (hint := meant(name, PRESETS)):
        raise ValueError(f"{name} does not exist; {hint}Presets: {', '.join(PRESETS)}.")


def read_config(source: str | Path) -> Any:
    """Return a config of transformers.

    Args:
        source: a ``config.json``, the folder or the hub id of a model, a preset such as ``llama-60m``, or words
            such as ``llama:hidden=256,layers=4``: a family, and fields of its config or the short names hidden,
            layers, heads, kv_heads, intermediate, vocab and window. Where words name no vocabulary, it is that
            of :func:`byte_tokenizer`.

    Raises:
        ValueError: if there is none, or a field is unknown.

    >>> config = read_config("llama:hidden=256,layers=4,heads=8,tie_word_embeddings=true")
    >>> config.hidden_size, config.num_hidden_layers, config.tie_word_embeddings
    (256, 4, True)
    """
    from transformers import AutoConfig

    text = PRESETS.get(str(source), str(source))
    path = Path(text).expanduser()
    check_preset(text)
    if ":" in text and not path.exists():
        family, _, words = text.partition(":")
        return _from_words(family, words)
    remote = not path.exists() and is_hub_id(text) and path.suffix != ".json"  # the config alone is fetched
    if path.suffix != ".json" and not remote:
        path = find(source)
        if path.is_file():
            raise ValueError(f"{source} is one GGUF file; give a folder, a config.json or a preset.")
        path = path / "config.json"
    if not remote and not path.is_file():
        raise ValueError(f"{path} does not exist; give a config.json, or one of {', '.join(PRESETS)}.")
    try:
        return AutoConfig.from_pretrained(text if remote else path)
    except Exception as error:  # what transformers raises is of any kind and many lines
        raise ValueError(f"{source} has no config to be read: {' '.join(str(error).split())[:300]}") from error


def fresh(
    config: Any,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str = "cpu",
    attention: str | None = None,
) -> Any:
    """Make a causal language model with random numbers, as its family draws them.

    Of encoders such as BERT it is the decoder, which sees only the tokens before.

    Args:
        config: of transformers, or what :func:`read_config` takes.
        dtype: of the weights.
        seed: of the numbers.
        device: "meta" makes a model without numbers.
        attention: its name in transformers; None means the usual one.

    Raises:
        ValueError: if there is no such model, or its sizes do not fit each other.

    >>> model = fresh("llama:hidden=32,layers=2,heads=4,intermediate=64,vocab=100")
    >>> model.num_parameters()
    27040
    """
    from transformers import AutoModelForCausalLM

    config = read_config(config) if isinstance(config, (str, Path)) else copy.deepcopy(config)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    with torch.random.fork_rng(devices=[]), quiet(), torch.device(device):
        torch.manual_seed(seed)
        try:
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        except Exception as error:
            raise ValueError(f"no such model can be made: {' '.join(str(error).split())[:300]}") from error


def causal_attention() -> str:
    """Return the name of an attention that never makes a mask, which fused kernels do not need.

    The usual one leaves the mask out where it sees that none is needed, which it cannot without numbers.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("rankwise_causal", sdpa_attention_forward)
    return "rankwise_causal"


def byte_tokenizer() -> Any:
    """Return a tokenizer whose tokens are the 256 bytes and an end of text.

    >>> byte_tokenizer()("né")["input_ids"]
    [78, 128, 103]
    """
    return _tokenizer([], 0)


def trained_tokenizer(texts: Sequence[str], size: int) -> Any:
    """Train a tokenizer of byte pairs on texts.

    Args:
        texts: what it is trained on.
        size: the most tokens that it may have, of which 257 are the bytes and the end of text.

    Raises:
        ValueError: if the size is too small.
    """
    if size <= BYTES:
        raise ValueError(f"a tokenizer of byte pairs needs more than {BYTES} tokens, got {size}; use bytes.")
    return _tokenizer(texts, size)


def _tokenizer(texts: Sequence[str], size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([END, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if texts:
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=[END], initial_alphabet=letters, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def _from_words(family: str, words: str) -> Any:
    from transformers import AutoConfig

    given: dict[str, Any] = {}
    for word in filter(None, words.split(",")):
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"a model in words is family:field=value,..., got {word!r}.")
        given[SHORT.get(name, name)] = _value(value)
    try:
        blank = AutoConfig.for_model(family)
    except Exception as error:
        raise ValueError(f"{family!r} is no family of transformers; llama, gpt2 and qwen3 are.") from error
    known = [*blank.to_dict(), *blank.attribute_map]
    for name in given:
        if name not in known:
            hint = meant(name, [*SHORT, *known])
            raise ValueError(
                f"the config of {family} has no field {name!r}; {hint}Short names: {', '.join(SHORT)}."
            )
    if "num_attention_heads" in given and "num_key_value_heads" in known:
        given.setdefault("num_key_value_heads", given["num_attention_heads"])
    given.setdefault("vocab_size", BYTES)
    try:
        return AutoConfig.for_model(family, **given)
    except Exception as error:
        raise ValueError(f"{family}:{words} does not fit: {' '.join(str(error).split())[:300]}") from error


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
