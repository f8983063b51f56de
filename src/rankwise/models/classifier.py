"""Models that sort texts into classes: loading one, with a new head where it has none, and batches for it."""

from collections.abc import Sequence
from json import dumps, loads
from pathlib import Path
from typing import Any

import torch
from torch import Generator, nn

from ..core.files import write_text
from .load import find, tokenizer_of
from .model_folder import weight_files
from .quantizer import register_when_ready
from .quiet import quiet

LABELS = "labels.json"  # of an adapter's folder: the names of the classes
NO_HEAD = (
    "{name} is of a new head, which neither {folder} nor the adapter has values of; train it with the adapter "
    "(also=lambda name: ...), or save the classifier before it is adapted and give that folder as the base."
)
NEW = "rankwise_new_head"  # of a model in memory: the names of what was drawn at random


def load_classifier(
    source: str | Path, labels: Sequence[str], *, dtype: torch.dtype | None = None, seed: int = 0
) -> tuple[Any, Any]:
    """Load a model as a classifier, and its tokenizer.

    A head of the checkpoint stays if it has as many outputs; otherwise there is a new one, drawn at random.

    Args:
        source: as in :func:`rankwise.load`, but no GGUF file.
        labels: the classes; their order is that of the outputs of a new head.
        dtype: of the weights; None keeps those of the checkpoint.
        seed: of the new head.

    Raises:
        ValueError: if there is no such model, it has no tokenizer, or no classifier can be made of it.
    """
    from transformers import AutoModelForSequenceClassification

    folder = find(source)
    if folder.is_file():
        raise ValueError(f"{source} is one GGUF file; a classifier needs a folder.")
    weight_files(folder)
    register_when_ready()
    config, tokenizer = classifier_config(folder, labels)
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer.")
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model, found = AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=config,
                dtype=dtype or "auto",
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{source} cannot be made a classifier: {' '.join(str(error).split())[:300]}"
            ) from error
    drawn = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    inside = [name for name in found["missing_keys"] if not is_head(model, name)]
    if inside:
        raise ValueError(
            f"{sorted(inside)[0]} is not in the checkpoint, as {len(inside)} tensors in all. Where it is new as "
            "the head is, such as a pooler, let transformers make the classifier "
            "(AutoModelForSequenceClassification.from_pretrained), save it, and give that folder."
        )
    setattr(model, NEW, frozenset(drawn))
    return model.eval(), tokenizer


def new_head(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that :func:`load_classifier` drew; no checkpoint has them."""
    return vars(model).get(NEW, frozenset())


def refuse_new_head(model: nn.Module) -> None:
    """Raise ValueError if :func:`load_classifier` drew a head for a model."""
    names = sorted(new_head(model))
    if names:
        raise ValueError(
            f"the head of this classifier is new and random ({', '.join(names)}): it must train whole and be "
            "saved with what trains, which an adapter with a name cannot do. Leave the name out and have 'also' "
            "accept the head; or train the head, save the model, and load that."
        )


def classifier_config(folder: Path, labels: Sequence[str]) -> tuple[Any, Any]:
    """Return the config of a model's classifier, and the tokenizer, which can pad texts, if there is one."""
    from transformers import AutoConfig

    tokenizer = tokenizer_of(folder)
    config: Any = AutoConfig.from_pretrained(folder)
    known = dict(getattr(config, "label2id", None) or {})
    if not set(labels) <= set(known):
        name_classes(config, labels)
    if tokenizer is None:
        return config, None
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = tokenizer.pad_token_id
        config.pad_token_id = tokenizer.pad_token_id
    return config, tokenizer


def write_labels(model: nn.Module, folder: Path) -> None:
    """Write the names of a classifier's classes beside its adapter, if a model is one of transformers."""
    labels = _labels_of(model)
    if len(labels) > 1:
        write_text(folder / LABELS, dumps(labels) + "\n")


def read_labels(folder: str | Path) -> tuple[str, ...]:
    """Return the names of the classes that an adapter tells apart, in the order of the outputs.

    :func:`load_classifier` makes of them and of the model that was adapted what :func:`rankwise.load_adapter`
    takes.

    Args:
        folder: of an adapter.

    Returns:
        none if it is no classifier's, or of one output alone, which has no classes.

    Raises:
        ValueError: if the file is damaged.
    """
    file = Path(folder) / LABELS
    if not file.is_file():
        return ()
    try:
        labels = loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); get it again.") from error
    words = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    if not words or len(set(labels)) != len(labels) or not labels:
        raise ValueError(f"{file} is damaged: it must hold a list of different words.")
    return tuple(labels) if len(labels) > 1 else ()


def check_labels(model: nn.Module, labels: Sequence[str], source: str) -> None:
    """Raise ValueError unless a model is a classifier of so many classes."""
    if len(_labels_of(model)) != len(labels):
        raise ValueError(
            f"{source} is of a classifier with the labels {', '.join(labels)}, which this "
            f"{type(model).__name__} does not tell apart; give the model that load_classifier(base, "
            "read_labels(adapter)) of rankwise.models returns."
        )


def put_labels(model: nn.Module, labels: Sequence[str]) -> None:
    """Name the classes of a model, if it is a classifier of so many."""
    if labels and len(_labels_of(model)) == len(labels):
        name_classes(model.config, labels)


def name_classes(config: Any, labels: Sequence[str]) -> None:
    """Say in a config what the outputs of a classifier are called."""
    config.label2id = {label: i for i, label in enumerate(labels)}
    config.id2label = {i: label for label, i in config.label2id.items()}


def _labels_of(model: Any) -> list[str]:
    """Return the names of a classifier's classes, or none if a model is none."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return []
    return [str(model.config.id2label[i]) for i in range(model.config.num_labels)]


def is_head(model: Any, name: str) -> bool:
    """Whether a name is one of a classifier's head."""
    return not name.startswith(f"{model.base_model_prefix}.")


def labelled_batches(
    examples: Sequence[tuple[str, str]],
    model: Any,
    tokenizer: Any,
    *,
    window: int = 512,
    rows: int = 16,
    seed: int | None = None,
) -> list[dict[str, Any]]:
    """Make padded batches of texts and labels.

    Args:
        examples: texts and labels.
        model: from :func:`load_classifier`; its config numbers the labels.
        tokenizer: of the model.
        window: most tokens of a text; what is longer is cut off.
        rows: texts of a batch.
        seed: of the order of the texts; None keeps theirs.

    Raises:
        ValueError: if the model does not know a label.
    """
    numbers = {str(label): int(i) for label, i in model.config.label2id.items()}
    unknown = sorted({label for _, label in examples} - set(numbers))
    if unknown:
        raise ValueError(f"label {unknown[0]!r} is none of {', '.join(numbers)}.")
    order = range(len(examples))
    if seed is not None:
        order = torch.randperm(len(examples), generator=Generator().manual_seed(seed)).tolist()
    batches = []
    for low in range(0, len(examples), rows):
        chosen = [examples[i] for i in order[low : low + rows]]
        encoded = tokenizer(
            [text for text, _ in chosen], padding=True, truncation=True, max_length=window, return_tensors="pt"
        )
        batches.append({**encoded, "labels": torch.tensor([numbers[label] for _, label in chosen])})
    return batches


def accuracy(model: nn.Module, batches: Sequence[dict[str, Any]]) -> float:
    """Measure the share of texts that get their label."""
    from .causal import evaluating

    device, right, count = next(model.parameters()).device, 0, 0
    with evaluating(model):
        for batch in batches:
            inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
            right += int((model(**inputs).logits.argmax(-1).cpu() == batch["labels"]).sum())
            count += len(batch["labels"])
    return right / count
