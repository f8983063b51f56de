"""Examples from files: on what the loss counts, how windows are filled, and errors with the line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import WORDS, llama, worded
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPTNeoXConfig,
    Lfm2Config,
    OPTConfig,
)

from rankwise.models.examples import Example, has_labels, kept_aside, read_examples, read_labelled
from rankwise.models.packing import keeps_apart, packed, unlabelled

END = 1
CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture
def tokenizer():
    return worded()


def written(tmp_path: Path, *records: object) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return path


def told(example: Example) -> tuple[list[int], list[int]]:
    """The tokens before and those that are learned, if they come after one another."""
    learned = [i for i, count in zip(example.ids, example.counts, strict=True) if count]
    return [i for i, count in zip(example.ids, example.counts, strict=True) if not count], learned


def number(word: str) -> int:
    return WORDS.index(word) + 3


def test_each_kind_of_line(tmp_path, tokenizer):
    path = written(
        tmp_path,
        {"text": "ban bar"},
        "",
        {"prompt": "ban ", "completion": "bar bas"},
        {"question": "ban", "answer": "bar", "source": "nowhere"},
    )
    examples = read_examples(path, tokenizer)
    ban, bar, bas = map(number, ("ban", "bar", "bas"))
    assert [told(each) for each in examples] == [
        ([], [ban, bar, END]),
        ([ban], [bar, bas, END]),
        ([ban], [bar, END]),
    ]
    packed_file = tmp_path / "data.jsonl.gz"
    packed_file.write_bytes(gzip.compress(path.read_bytes()))
    assert read_examples(packed_file, tokenizer) == examples


def test_a_plain_text_is_one_example(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("ban bar\nbas")
    (example,) = read_examples(path, tokenizer)
    assert told(example) == ([], [number(word) for word in ("ban", "bar", "bas")])


def test_conversations_teach_what_the_assistant_says(tmp_path, tokenizer):
    words = [("system", "can"), ("user", "ban"), ("assistant", "bar"), ("user", "bas"), ("assistant", "bat")]
    messages = [{"role": role, "content": content} for role, content in words]
    tokenizer.chat_template = CHAT
    path = written(tmp_path, {"messages": messages})
    (example,) = read_examples(path, tokenizer)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert list(example.ids) == tokenizer(whole)["input_ids"]
    assert told(example)[1] == [number("bar"), END, number("bat"), END]
    tokenizer.chat_template = "{{ messages | length }} {% for m in messages %}{{ m['content'] }} {% endfor %}"
    with pytest.raises(ValueError, match=r"line 1: the chat template writes earlier messages anew"):
        read_examples(path, tokenizer)


def test_what_begins_a_text_is_put_there_once(tmp_path, tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    examples = read_examples(
        written(tmp_path, {"prompt": "ban", "completion": "bar"}, {"text": "<s> ban"}), tokenizer
    )
    assert [list(each.ids) for each in examples] == [
        [0, number("ban"), number("bar"), END],
        [0, number("ban"), END],
    ]
    assert examples[0].counts == (False, False, True, True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "ban', "line 2 is no JSON .* is the file complete"),
        ('["ban"]', "line 2 must hold one JSON object"),
        ("{}", "line 2 has the fields none; known: text"),
        ({"txt": "ban"}, "line 2 has the fields txt; known: text; prompt and completion"),
        ({"text": ""}, 'line 2 needs "text" with words in it'),
        ({"text": 3}, 'line 2 needs "text" with words in it, got 3'),
        ({"prompt": "ban"}, 'line 2 needs "completion"'),
        ({"answer": "ban"}, 'line 2 needs "question"'),
        ({"messages": "ban"}, 'line 2 needs "messages"'),
        ({"messages": [{"role": "user"}]}, 'line 2 needs "messages"'),
        ({"messages": [{"role": "user", "content": "ban"}]}, "line 2 has no message of the assistant"),
        ({"messages": [{"role": "assistant", "content": "ban"}]}, "line 2 has messages, but .* no chat template"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, tokenizer, line, message):
    with pytest.raises(ValueError, match=message):
        read_examples(written(tmp_path, {"text": "ban"}, line), tokenizer)


@pytest.mark.parametrize("name", ["data.jsonl", "text.txt"])
def test_empty_and_missing_files_are_named(tmp_path, tokenizer, name):
    with pytest.raises(ValueError, match=f"{name}.* does not exist"):
        read_examples(tmp_path / name, tokenizer)
    (tmp_path / name).write_text("\n \n")
    with pytest.raises(ValueError, match=f"{name} is empty"):
        read_examples(tmp_path / name, tokenizer)


def test_labels(tmp_path):
    path = written(tmp_path, {"text": "ban", "label": "good"}, {"text": "bar", "label": 0})
    assert has_labels(path)
    assert read_labelled(path) == [("ban", "good"), ("bar", "0")]
    with pytest.raises(ValueError, match='line 1 needs a "label"'):
        read_labelled(written(tmp_path, {"text": "ban"}))
    with pytest.raises(ValueError, match='line 2 needs "text"'):
        read_labelled(written(tmp_path, {"text": "ban", "label": 1}, {"label": 1}))


def example(*ids: int, prompt: int = 0) -> Example:
    return Example(ids, tuple(i >= prompt for i in range(len(ids))))


def test_examples_of_a_window_do_not_see_each_other():
    """Logits and loss of packed examples are those of each alone."""
    model = llama(initializer_range=0.3)
    examples = [
        example(3, 4, 5, 6),
        example(7, 8, 9, prompt=2),
        example(10, 11, 12, 13, 14, prompt=1),
        example(15, 16),
    ]
    (batch,) = packed(examples, 9)
    assert batch["input_ids"].shape == (2, 9)  # nine and five, padded
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([each.ids])).logits[0] for each in examples])
        together = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    found = torch.cat([together[0, :4], together[0, 4:7], together[1, :5], together[0, 7:9]])
    torch.testing.assert_close(found, alone)
    wrong = model(batch["input_ids"]).logits  # without the positions they would
    assert not torch.allclose(wrong[0, 4:7], alone[4:7], atol=1e-3)
    assert batch["labels"].tolist() == [
        [-100, 4, 5, 6, -100, -100, 9, -100, 16],
        [-100, 11, 12, 13, 14, -100, -100, -100, -100],
    ]


def test_long_texts_are_split_and_long_answers_cut():
    (batch,) = packed([example(*range(3, 13))], 4, rows=3)
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 0, 0]]
    with pytest.warns(UserWarning, match="1 of 2 examples of the file are longer than the window of 4 tokens"):
        batches = packed([example(3, 4, 5, 6, 7, prompt=2), example(3, 4)], 4, rows=1, name="the file")
    assert [each["labels"].tolist() for each in batches] == [[[-100, -100, 5, 6]], [[-100, 4]]]
    with pytest.raises(ValueError, match="nothing to learn within 4 tokens; give a longer window"):
        packed([example(3, 4, 5, 6, 7, prompt=4)], 4)
    for options in ({"window": 1}, {"window": 4, "rows": 0}):
        with pytest.raises(ValueError, match=r"must be >= [12]"):
            packed([example(3, 4)], **options)


def test_the_order_is_that_of_the_seed_and_nothing_is_lost():
    examples = [example(*range(3, 5 + i)) for i in range(20)]
    orders = [packed(examples, 24, seed=seed) for seed in (0, 0, 1)]
    rows = [[row.tolist() for batch in order for row in batch["input_ids"]] for order in orders]
    assert rows[0] == rows[1] != rows[2]
    counts = [sum(int((batch["labels"] >= 0).sum()) for batch in order) for order in orders]
    assert counts == [sum(len(each.ids) - 1 for each in examples)] * 3


def test_statistics_get_the_first_tokens_without_labels_and_padding():
    single = packed([example(*range(3, 9)), example(3, 4), example(5, 6, 7)], 6, rows=1)
    taken = unlabelled(single, 8)
    assert [each["input_ids"].shape[1] for each in taken] == [6, 5]
    assert all("labels" not in each for each in taken)


def test_a_part_is_kept_aside():
    rest, aside = kept_aside([example(3, i) for i in range(4, 24)], 0.1, 0, "x")
    assert (len(rest), len(aside)) == (18, 2)
    assert {each.ids for each in rest + aside} == {(3, i) for i in range(4, 24)}
    (head,), (tail,) = kept_aside([example(*range(3, 43))], 0.1, 0, "x")
    assert (head.ids, tail.ids) == (tuple(range(3, 39)), tuple(range(39, 43)))
    for few in ([example(3, 4, prompt=1)], [example(3, 4, 5)]):
        with pytest.raises(ValueError, match="x is too short to keep a part of it aside"):
            kept_aside(few, 0.1, 0, "x")


def causal(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
APART = {"Llama": llama, "GPT-NeoX": lambda: causal(GPTNeoXConfig(**SIZES, **ENDS, intermediate_size=48))}
MIXED = {
    "OPT": lambda: causal(OPTConfig(**SIZES, **ENDS, ffn_dim=48, word_embed_proj_dim=32)),
    "Falcon": lambda: causal(FalconConfig(**SIZES, **ENDS)),
    "LFM2": lambda: causal(
        Lfm2Config(
            **SIZES, **ENDS, intermediate_size=48, num_key_value_heads=2, layer_types=["conv", "full_attention"]
        )
    ),
    "BLOOM": lambda: causal(
        BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    ),  # takes no positions
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*APART, *MIXED])
def test_it_is_found_out_whether_examples_of_a_window_see_each_other(name: str, dtype: torch.dtype):
    model = {**APART, **MIXED}[name]().to(dtype).train()
    state = torch.random.get_rng_state()
    assert keeps_apart(model) == (name in APART)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", MIXED)
def test_examples_alone_in_their_rows_are_not_seen_by_others(name: str):
    model, examples = MIXED[name](), [example(3, 4, 5, 6), example(7, 8, 9), example(15, 16)]
    (batch,) = packed(examples, 9, alone=True)
    with torch.no_grad():
        found = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        for row, each in zip(found, examples, strict=True):
            alone = model(torch.tensor([each.ids])).logits[0]
            torch.testing.assert_close(row[: len(each.ids)], alone, rtol=1e-4, atol=1e-5)
