"""Figures about tiny random models against formulas in float64."""

import json
import math
import sys

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from rankwise.core.surgery import replace, select
from rankwise.matrices import LowRank
from rankwise.models.causal import generate
from rankwise.models.evaluate import evaluate, sizes
from rankwise.models.speed import speed

VOCABULARY = 64


def tiny(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = LlamaConfig(**{**sizes, **heads, "initializer_range": 0.3, **changes})
    return LlamaForCausalLM(config).eval()


def some_ids(count: int) -> Tensor:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(1))


class Letters:
    """A tokenizer of one token a letter."""

    eos_token_id = 63

    def __call__(self, text: str, **_):
        return {"input_ids": [ord(letter) % VOCABULARY for letter in text]}

    def decode(self, ids, **_):
        return "".join(chr(97 + i % 26) for i in ids)


def log_p(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.double()(ids[None]).logits[0, :-1].log_softmax(-1)


@pytest.mark.parametrize(("count", "scored"), [(40, [15, 15, 7]), (33, [15, 15]), (34, [15, 15, 1]), (9, [8])])
def test_perplexity_is_the_formula(count, scored):
    model, ids = tiny(), some_ids(count)
    report = evaluate(model, None, {"a": ids}, window=16)
    parts = [ids[low : low + 16] for low in range(0, count, 16)][: len(scored)]
    nll = torch.cat([-log_p(model, part).gather(1, part[1:, None]) for part in parts])
    (row,) = report.rows
    assert row["tokens"] == sum(scored) == len(nll)
    assert row["nats"] == pytest.approx(nll.mean().item(), rel=1e-5)
    assert row["perplexity"] == pytest.approx(nll.mean().exp().item(), rel=1e-5)
    assert set(row) == {"name", "tokens", "perplexity", "nats"}
    assert json.loads(report.to_json())["texts"] == [row]


def test_divergence_is_the_formula():
    model, dense, ids = tiny(0), tiny(1), some_ids(16)
    (row,) = evaluate(model, None, {"a": ids}, window=16, dense=dense).rows
    q, p = log_p(model, ids), log_p(dense, ids)
    assert row["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5)
    assert row["dense_perplexity"] == pytest.approx((-p.gather(1, ids[1:, None])).mean().exp().item(), rel=1e-5)
    assert row["kl"] > 0.1


def test_chunks_change_nothing(monkeypatch):
    model, dense, ids = tiny(0), tiny(1), some_ids(30)
    whole = evaluate(model, None, {"a": ids}, window=16, dense=dense).rows
    monkeypatch.setattr(sys.modules[evaluate.__module__], "_ROWS", 4)
    chunked = evaluate(model, None, {"a": ids}, window=16, dense=dense).rows
    for key in ("tokens", "perplexity", "dense_perplexity", "kl"):
        assert chunked[0][key] == pytest.approx(whole[0][key], rel=1e-6)


def test_a_model_does_not_diverge_from_itself():
    model = tiny()
    (row,) = evaluate(model, None, {"a": some_ids(20)}, window=16, dense=model).rows
    assert row["kl"] == 0
    assert row["perplexity"] == row["dense_perplexity"]


def test_uniform_logits_give_the_size_of_the_vocabulary():
    model = tiny()
    nn.init.zeros_(model.lm_head.weight)
    (row,) = evaluate(model, None, {"a": some_ids(20)}, window=16).rows
    assert row["perplexity"] == pytest.approx(VOCABULARY, rel=1e-5)


def test_strings_are_tokenized_and_the_last_tokens_taken():
    model, ids = tiny(), torch.tensor(Letters()("a text of letters")["input_ids"])
    rows = evaluate(model, Letters(), {"s": "a text of letters", "t": ids}, window=8, max_tokens=10).rows
    (last,) = evaluate(model, None, {"s": ids[-10:]}, window=8).rows
    assert {**rows[0], "name": ""} == {**rows[1], "name": ""} == {**last, "name": ""}


def test_the_model_is_left_as_it_was():
    model = tiny(attention_dropout=0.5).train()
    a, b = (evaluate(model, None, {"a": some_ids(20)}, window=16).rows for _ in range(2))
    assert a == b
    assert model.training
    assert all(module.training for module in model.modules())


def test_logits_that_are_not_finite_are_an_error():
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[3, 5] = math.nan
    with pytest.raises(ValueError, match='text "novel": the logits of LlamaForCausalLM are not finite'):
        evaluate(model, None, {"novel": some_ids(20)}, window=16)


def test_a_loss_without_a_finite_perplexity_is_an_error():
    model = tiny()
    with torch.no_grad():
        model.model.norm.weight.fill_(1e6)
    with pytest.raises(ValueError, match=r'text "novel": a loss of .* nats per token has no finite perplexity'):
        evaluate(model, None, {"novel": some_ids(20)}, window=16)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ({}, {}, "texts is empty"),
        ({"a": ""}, {}, 'text "a" is empty'),
        ({"a": torch.tensor([1])}, {}, 'text "a" is empty or has one token'),
        ({"a": torch.tensor([1, VOCABULARY])}, {}, "has token 64"),
        ({"a": some_ids(8)}, {"window": 1}, "window must be >= 2"),
        ({"a": some_ids(8)}, {"window": 65}, "window 65 is longer than the 64 positions"),
        ({"a": some_ids(8)}, {"max_tokens": 1}, "max_tokens must be >= 2"),
        ({"a": some_ids(8)}, {"dense": tiny(vocab_size=80)}, "vocabulary of 80"),
        ({"a": some_ids(8)}, {"dense": nn.Linear(2, 2)}, "Linear is not a causal language model"),
    ],
)
def test_bad_arguments_are_named(texts, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(tiny(), Letters(), texts, **{"window": 16, **options})


def test_an_encoder_is_an_error():
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=64
    )
    with pytest.raises(ValueError, match="BertModel is not a causal language model"):
        evaluate(BertModel(config), None, {"a": some_ids(8)}, window=4)


@pytest.mark.parametrize("tied", [True, False])
def test_sizes_count_shared_tensors_once_and_multiply_adds_where_they_happen(tied):
    model = tiny(tie_word_embeddings=tied)
    decoder = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 48 * 3)
    table, norms = VOCABULARY * 32, 5 * 32
    params = decoder + norms + (table if tied else 2 * table)
    assert sizes(model) == {"params": params, "bytes": 4 * params, "macs_per_token": decoder + table}


def test_sizes_count_structured_layers_by_their_matrices():
    model = tiny()
    before = sizes(model)
    site = next(iter(select(model).values()))
    m, n = site.weight.shape
    replace(model, site, LowRank(torch.randn(m, 3), torch.randn(3, n)))
    after = sizes(model)
    assert before["macs_per_token"] - after["macs_per_token"] == m * n - 3 * (m + n)
    assert before["params"] - after["params"] == m * n - 3 * (m + n)


def test_speed_reports_every_model():
    figures = speed({"a": tiny(0), "b": tiny(1)}, some_ids(20), prefill=16, decode=3, repeats=2)
    assert set(figures) == {"a", "b"}
    assert all(
        figures[name][key] > 0 for name in figures for key in ("prefill_tokens_per_s", "decode_tokens_per_s")
    )


@pytest.mark.parametrize(
    ("options", "message"), [({"prefill": 21}, "ids must be"), ({"decode": 0}, "decode must be")]
)
def test_speed_names_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        speed({"a": tiny()}, some_ids(20), **options)


def test_generation_is_greedy():
    model, prompt = tiny(), "hello"
    ids = torch.tensor([Letters()(prompt)["input_ids"]])
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert generate(model, Letters(), prompt, tokens=6) == Letters().decode(ids[0, 5:].tolist())


def test_generation_needs_a_prompt():
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(tiny(), Letters(), "")
