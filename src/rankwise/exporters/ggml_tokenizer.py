"""A byte-level BPE tokenizer as llama.cpp reads it."""

import json
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # kinds of tokens
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
GPT2 = "bytes after words"
SPLITS: dict[tuple[str, ...], str] = {  # how text is cut before the merges -> llama.cpp's name for it
    (GPT2,): "gpt-2",
    ("single digits", GPT2): "smollm",
    (QWEN2, "bytes"): "qwen2",
    (LLAMA3, "bytes"): "llama-bpe",
}


def add_tokenizer(writer: Any, tokenizer: Any, rows: int) -> None:
    """Add the vocabulary, merges, special tokens and chat template of a tokenizer.

    Args:
        writer: a ``gguf.GGUFWriter``.
        tokenizer: of transformers.
        rows: of the embedding table; the vocabulary is filled up to it.

    Raises:
        ValueError: if it is no byte-level BPE, or cuts texts in a way whose name in llama.cpp is not known here.
    """
    data = _data(tokenizer)
    model = data["model"]
    tokens, kinds = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    largest = max([*model["vocab"].values(), *(token["id"] for token in data["added_tokens"])])
    if largest >= rows:
        raise ValueError(f"the tokenizer has token {largest}, but the model only {rows} rows of embeddings.")
    for token, i in model["vocab"].items():
        tokens[i], kinds[i] = token, NORMAL
    for token in data["added_tokens"]:
        tokens[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split(data))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    for name in ("bos", "eos", "unk", "pad"):
        if (i := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(i)
    ids = tokenizer("a", verbose=False)["input_ids"]
    writer.add_add_bos_token(len(ids) > 1 and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(ids) > 1 and ids[-1] == tokenizer.eos_token_id)
    writer.add_add_space_prefix(False)
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        templates = [{"name": name, "template": text} for name, text in templates.items()]
    if templates:
        writer.add_chat_template(templates)


def _data(tokenizer: Any) -> dict[str, Any]:
    """Return what a ``tokenizer.json`` holds, if llama.cpp's BPE can do the same."""
    if tokenizer is None:
        raise ValueError("the model has no tokenizer, which a GGUF file must hold; save it with its tokenizer.")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    data = {} if backend is None else json.loads(backend.to_str())
    model, normalizer = data.get("model", {}), data.get("normalizer")
    if (
        model.get("type") != "BPE"
        or model.get("byte_fallback")
        or (normalizer or {}).get("type") not in (None, "NFC")
    ):
        raise ValueError(
            f"the tokenizer is {model.get('type', type(tokenizer).__name__)} with the normalizer "
            f"{json.dumps(normalizer)[:80]}; only byte-level BPE can be written to GGUF so far."
        )
    if not model["merges"]:
        raise ValueError("the tokenizer has no merges; llama.cpp does not open a GGUF file without any.")
    return data


def _split(data: dict[str, Any]) -> str:
    """Return llama.cpp's name for the way a tokenizer cuts texts before it merges."""
    given: dict[str, Any] = data.get("pre_tokenizer") or {"type": "nothing"}
    steps = tuple(map(_step, given["pretokenizers"] if given["type"] == "Sequence" else [given]))
    name = SPLITS.get(steps)
    if name is None or bool(data["model"].get("ignore_merges")) > (name == "llama-bpe"):
        known = ", ".join(SPLITS.values())
        raise ValueError(
            f"the tokenizer cuts texts by {json.dumps(given)[:200]}, and llama.cpp's name for that is not known "
            f"here; known are {known}."
        )
    return name


def _step(step: dict[str, Any]) -> str:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": words}:
            return GPT2 if words else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "single digits"
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return pattern
        case _:
            return json.dumps(step)
