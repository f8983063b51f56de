"""Examples to train a language model or a classifier on: read from files, with the line in every error."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Generator

from .texts import read_text

PAIRS = (("prompt", "completion"), ("question", "answer"))
FORMS = (("messages",), *PAIRS, ("text",))
KNOWN = "text; prompt and completion; question and answer; messages; or text and label"
T = TypeVar("T")
Segment = tuple[str, bool]
"""A part of a text, and whether the loss counts on it."""


@dataclass(frozen=True)
class Example:
    """A sequence of tokens.

    Args:
        ids: the tokens.
        counts: whether the loss counts on each.
    """

    ids: tuple[int, ...]
    counts: tuple[bool, ...]

    @property
    def whole(self) -> bool:
        """Whether the loss counts on all of it."""
        return all(self.counts)


def is_lines(path: str | Path) -> bool:
    """Whether a file holds JSON lines, by its name: ``.jsonl``, also packed as ``.jsonl.gz`` or ``.jsonl.xz``."""
    return ".jsonl" in Path(path).suffixes[-2:]


def read_lines(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """Read JSON lines; each comes with its place in words. Empty lines are passed over.

    Raises:
        ValueError: if the file is missing, empty, or a line is not one JSON object.
    """
    found = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{place} is no JSON ({error}); is the file complete?") from error
        if not isinstance(record, dict):
            raise ValueError(f"{place} must hold one JSON object, got {str(record)[:40]!r}.")
        found.append((place, record))
    if not found:
        raise ValueError(f"{path} is empty; give at least one line.")
    return found


def read_examples(path: str | Path, tokenizer: Any) -> list[Example]:
    """Read examples to train a causal language model on.

    A plain text is one example. A JSON line is one of these, each closed by the end-of-text token:
    ``{"text"}``; ``{"prompt", "completion"}``, one directly after the other; ``{"question", "answer"}``, with a
    line break between; both have the loss on the second part only. ``{"messages": [{"role", "content"}, ...]}``
    goes through the tokenizer's chat template, with the loss on what the assistant says.

    Args:
        path: of a plain text, or of JSON lines.
        tokenizer: of transformers.

    Raises:
        ValueError: if the file is missing, empty or damaged, or a line fits none of these.
    """
    if not is_lines(path):
        text = read_text(path)
        if not text.strip():
            raise ValueError(f"{path} is empty; give a text with words in it.")
        return [_tokenized([(text, True)], tokenizer)]
    examples = []
    for place, record in read_lines(path):
        example = _tokenized(_segments(place, record, tokenizer), tokenizer)
        if not any(example.counts[1:]):
            raise ValueError(f"{place} has no token to learn; it needs at least two, one of them in the answer.")
        examples.append(example)
    return examples


def has_labels(path: str | Path) -> bool:
    """Whether the first line of a file has a label.

    Raises:
        ValueError: as :func:`read_lines`.
    """
    return is_lines(path) and "label" in read_lines(path)[0][1]


def read_labelled(path: str | Path) -> list[tuple[str, str]]:
    """Read ``{"text", "label"}`` lines: (text, label in words), for a classifier.

    Raises:
        ValueError: if the file is missing, empty or damaged, or a line has no text or no label.
    """
    if not is_lines(path):
        raise ValueError(
            f'{path} must be .jsonl, with a "text" and a "label" in each line, as a classifier asks.'
        )
    found = []
    for place, record in read_lines(path):
        label = record.get("label")
        word = isinstance(label, str) and label == label.strip() != ""
        if not word and (not isinstance(label, int) or isinstance(label, bool)):
            raise ValueError(
                f'{place} needs a "label" that is a word, without spaces around it, or a whole number, as all '
                f"lines for a classifier do; got {label!r}."
            )
        found.append((_word(place, record, "text"), str(label)))
    return found


def in_order(labels: Iterable[str]) -> list[str]:
    """Sort labels: as numbers if all are whole ones, else as words.

    >>> in_order(["10", "9", "9"]), in_order(["good", "10", "9"])
    (['9', '10'], ['10', '9', 'good'])
    """
    found = sorted(set(labels))
    return sorted(found, key=int) if all(re.fullmatch(r"-?\d+", label) for label in found) else found


def kept_aside(examples: Sequence[T], share: float, seed: int, name: str) -> tuple[list[T], list[T]]:
    """Keep a share of the examples aside, at least one, chosen at random; of a single text, its end.

    Raises:
        ValueError: if there are too few.
    """
    if len(examples) == 1 and isinstance(examples[0], Example) and examples[0].whole:
        ids, counts = examples[0].ids, examples[0].counts
        cut = len(ids) - max(2, round(share * len(ids)))
        examples = [] if cut < 2 else [Example(ids[:cut], counts[:cut]), Example(ids[cut:], counts[cut:])]  # pyright: ignore[reportAssignmentType]
        order = [0, 1]
    else:
        order = torch.randperm(len(examples), generator=Generator().manual_seed(seed)).tolist()
    if len(examples) < 2:
        raise ValueError(f"{name} is too short to keep a part of it aside to judge by; give more, or other data.")
    aside = set(order[len(examples) - max(1, round(share * len(examples))) :])
    return (
        [each for i, each in enumerate(examples) if i not in aside],
        [examples[i] for i in sorted(aside)],
    )


def _segments(place: str, record: Mapping[str, Any], tokenizer: Any) -> list[Segment]:
    """Tell the parts of a record, and on which the loss counts."""
    forms = [form for form in FORMS if any(key in record for key in form)]
    if len(forms) > 1:
        each = " and of ".join(" with ".join(form) for form in forms)
        raise ValueError(f"{place} has fields of {each}, which are two forms of an example; keep one.")
    if "label" in record:
        raise ValueError(
            f'{place} has a "label", which only a classifier learns: then all lines need one, and a "text".'
        )
    if "messages" in record:
        return _ended(list(_turns(place, record["messages"], tokenizer)), None)
    for prompt, answer in PAIRS:
        if prompt in record or answer in record:
            between = "\n" if prompt == "question" else ""
            asked, said = (_word(place, record, key) for key in (prompt, answer))
            return _ended([(asked + between, False), (said, True)], tokenizer.eos_token)
    if "text" not in record:
        raise ValueError(f"{place} has the fields {', '.join(record) or 'none'}; known: {KNOWN}.")
    return _ended([(_word(place, record, "text"), True)], tokenizer.eos_token)


def _turns(place: str, messages: Any, tokenizer: Any) -> Iterator[Segment]:
    """Cut the text of a conversation where the assistant begins and ends."""
    if not isinstance(messages, list) or not all(_is_message(each) for each in messages):
        raise ValueError(f'{place} needs "messages": [{{"role": ..., "content": "..."}}, ...].')
    if not any(each["role"] == "assistant" for each in messages):
        raise ValueError(f"{place} has no message of the assistant to learn.")
    if tokenizer.chat_template is None:
        raise ValueError(f"{place} has messages, but the tokenizer has no chat template; give prompts instead.")
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if not before.startswith(done) or not after.startswith(before):
            raise ValueError(
                f"{place}: the chat template writes earlier messages anew, so the answer to message {i} cannot "
                "be told apart; cut the conversation into prompt and completion."
            )
        yield before[len(done) :], False
        yield after[len(before) :], True
        done = after


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _word(place: str, record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'{place} needs "{key}" with words in it, got {value!r}.')
    return value


def _ended(segments: list[Segment], end: str | None) -> list[Segment]:
    return segments if end is None else [*segments, (end, True)]


def _tokenized(segments: Sequence[Segment], tokenizer: Any) -> Example:
    """Turn segments into tokens one by one, so that no token spans two, after what begins a text, if anything."""
    begin = tokenizer.bos_token_id
    adds = begin is not None and tokenizer("", verbose=False)["input_ids"][:1] == [begin]
    ids, counts = [], []
    for text, count in segments:
        new = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if adds and not ids and new[:1] != [begin]:
            new = [begin, *new]
        ids += new
        counts += [count] * len(new)
    return Example(tuple(ids), tuple(counts))
