"""Which models predict the tokens to come, and which see them."""

import pytest
import torch
import transformers

import rankwise
from rankwise.models import fresh, read_config
from rankwise.models.causal import sees_ahead

SIZES = "hidden=32,layers=2,heads=4,intermediate=64,vocab=64"
SEEING = {
    "bert": lambda: transformers.BertLMHeadModel(read_config(f"bert:{SIZES}")),
    "xlnet": lambda: fresh("xlnet:d_model=32,n_layer=2,n_head=4,d_inner=48,vocab=64"),
}


@pytest.mark.parametrize(
    "words",
    [
        f"llama:{SIZES}",
        f"bert:{SIZES}",
        f"mixtral:{SIZES},kv_heads=2",
        "gpt2:n_embd=32,n_layer=2,n_head=4,vocab=64",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoders_see_the_tokens_before(words: str, dtype: torch.dtype):
    """That is so of a new BERT, too, whose config says otherwise."""
    assert not sees_ahead(fresh(words, dtype=dtype))


@pytest.mark.parametrize("kind", SEEING)
def test_a_model_that_sees_what_it_is_to_predict_has_no_perplexity(kind: str):
    model, ids = SEEING[kind](), torch.arange(40)
    assert sees_ahead(model)
    with pytest.raises(ValueError, match="sees the tokens that it is to predict"):
        rankwise.evaluate(model, None, {"text": ids}, window=16)


def test_numbers_that_are_not_finite_are_another_fault():
    model = fresh(f"llama:{SIZES}")
    model.model.norm.weight.data.fill_(float("nan"))
    assert not sees_ahead(model)


def test_as_few_positions_as_there_are_do():
    assert not sees_ahead(fresh("gpt2:n_embd=32,n_layer=2,n_head=4,vocab=64,n_positions=3"))
