"""Samples follow the model's own distribution, repeat, and are cached."""

import math

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from rankwise.linalg import draw_categorical
from rankwise.models import sampling
from rankwise.models.causal import Continued
from rankwise.models.key_value import reserved_cache
from rankwise.models.sampling import sample

VOCABULARY = 64
SMALL = {"tokens": 60, "window": 12}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path))
    return tmp_path / "samples"


def tiny(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "initializer_range": 0.3, **changes})).eval()


def markov(table: torch.Tensor) -> LlamaForCausalLM:
    """Build a model whose next token depends on the last one alone: logits are the rows of (k, k) ``table``."""
    k = len(table)
    model = tiny(hidden_size=k, vocab_size=k, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(k))  # the norm turns a unit vector into sqrt(k) times it
        model.lm_head.weight.copy_(table.mT / math.sqrt(k))
    return model


def test_frequencies_are_the_probabilities():
    table = torch.randn(8, 8, generator=torch.Generator().manual_seed(2))
    ids = sample(markov(table), tokens=40_000, window=64, batch=1000, cache=False)
    counts = torch.zeros(8, 8).index_put_(
        (ids[:, :-1].flatten(), ids[:, 1:].flatten()), torch.tensor(1.0), accumulate=True
    )
    p = table.softmax(-1)
    deviation = (counts / counts.sum(1, keepdim=True) - p) / (p * (1 - p) / counts.sum(1, keepdim=True)).sqrt()
    assert deviation.abs().max() < 4.5  # of 64 nearly standard normal numbers
    assert deviation.square().mean() < 1.6
    starts = ids[:, 0].bincount(minlength=8)
    assert (starts / len(ids) - 1 / 8).abs().max() < 0.06


def test_temperature_divides_the_logits():
    table = torch.randn(8, 8, generator=torch.Generator().manual_seed(2))
    cold = sample(markov(table), tokens=640, window=64, temperature=1e-3, cache=False)
    assert torch.equal(cold[:, 1:], table.argmax(1)[cold[:, :-1]])


def test_draws_invert_the_cumulative_sum():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    draws = torch.tensor([0.0, 0.2, 0.2499, 0.2501, 0.9])
    assert [int(draw_categorical(p.log(), u.view(1, 1))) for u in draws] == [1, 1, 1, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_token_is_drawn_given_all_before_it(dtype):
    """The cache and the attention in float32 change nothing: redo every step without them."""
    model = tiny().to(dtype)
    ids = sample(model, **SMALL, cache=False)
    generator = torch.Generator().manual_seed(0)
    torch.randint(VOCABULARY, (5,), generator=generator)
    draws = torch.rand(5, 11, generator=generator)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].float()
    again = torch.stack([draw_categorical(logits[:, t], draws[:, t : t + 1])[:, 0] for t in range(11)], dim=1)
    wrong = (again != ids[:, 1:]).float().mean()
    assert wrong <= (0 if dtype == torch.float32 else 0.1)  # rounding moves some draws over an edge


def test_shape_type_and_range():
    ids = sample(tiny(), tokens=50, window=12)
    assert ids.shape == (5, 12)
    assert ids.dtype == torch.long
    assert 0 <= int(ids.min()) <= int(ids.max()) < VOCABULARY


def test_same_seed_same_bits_whatever_the_batch():
    model = tiny()
    once = sample(model, **SMALL, cache=False)
    assert torch.equal(once, sample(model, **SMALL, cache=False))
    assert torch.equal(once, sample(model, **SMALL, cache=False, batch=2))
    assert not torch.equal(once, sample(model, **SMALL, cache=False, seed=1))


def test_autocast_samples_nearly_the_same():
    model = tiny()
    once, fast = sample(model, **SMALL, cache=False), sample(model, **SMALL, cache=False, autocast=True)
    assert torch.equal(once[:, 0], fast[:, 0])
    assert (once[:, 1] == fast[:, 1]).sum() >= 3


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["gpt2", "sliding"])
def test_other_families(kind, implementation):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=64)
        config.bos_token_id = config.eos_token_id = 0
        model = GPT2LMHeadModel(config)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4}
        model = MistralForCausalLM(MistralConfig(**sizes, **heads))
    model.set_attn_implementation(implementation)
    model = model.to(torch.bfloat16)
    assert sample(model, **SMALL, cache=False).shape == (5, 12)


SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
REMEMBERING = {
    "keys and values": lambda: tiny(),
    "states of a scan": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(**SIZES, state_size=8, time_step_rank=4)
    ),
    "states of heads": lambda: transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(**SIZES, state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=16)
    ),
    "a recurrence": lambda: transformers.RwkvForCausalLM(transformers.RwkvConfig(**SIZES)),
    "a cache of its own": lambda: transformers.MiniMaxForCausalLM(
        transformers.MiniMaxConfig(
            **SIZES,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=2,
        )
    ),
    "nothing": lambda: transformers.OpenAIGPTLMHeadModel(
        transformers.OpenAIGPTConfig(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    ),
}


@pytest.mark.parametrize("kind", REMEMBERING)
def test_what_follows_depends_on_all_that_came_before(kind):
    torch.manual_seed(0)
    model = REMEMBERING[kind]().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.normal_(0, 0.15)
        ids = torch.randint(0, VOCABULARY, (3, 12))
        continued, whole = Continued(model, reserved_cache(model, 12)), model(ids).logits
        found = [continued.next(ids[:, :4]), *(continued.next(ids[:, t : t + 1]) for t in range(4, 12))]
        alone = Continued(model).next(ids[:, -1:])
    torch.testing.assert_close(torch.stack(found, 1), whole[:, 3:], rtol=1e-4, atol=1e-4)
    assert float((alone - whole[:, -1]).abs().max()) > 0.01


def test_second_call_does_not_run_the_model(folder, monkeypatch):
    model = tiny()
    once = sample(model, **SMALL)
    assert len(list(folder.iterdir())) == 1

    def refuse(*_):
        raise AssertionError("the model ran")

    monkeypatch.setattr(sampling, "Continued", refuse)
    assert torch.equal(once, sample(model, **SMALL))
    with pytest.raises(AssertionError, match="the model ran"):
        sample(model, **SMALL, seed=1)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(AssertionError, match="the model ran"):
        sample(model, **SMALL)


@pytest.mark.parametrize("keep", [0, 5, 100])
def test_a_damaged_file_is_made_again(folder, keep):
    model = tiny()
    once = sample(model, **SMALL)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    assert torch.equal(once, sample(model, **SMALL))
    assert path.read_bytes() == whole
    assert list(folder.iterdir()) == [path]


def test_models_that_cannot_be_sampled():
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=64
    )
    for model in (BertModel(config), nn.Linear(2, 2)):
        with pytest.raises(
            ValueError, match="not a causal language model of transformers; pass calibration data"
        ):
            sample(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens must be >= 1"),
        ({"window": 1}, "window must be >= 2"),
        ({"batch": 0}, "batch must be >= 1"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"window": 65}, "longer than the 64 positions"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        sample(tiny(), **{**SMALL, **options})


def test_logits_that_are_not_finite_are_an_error(folder):
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[3, 5] = math.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        sample(model, **SMALL)
    assert not folder.exists()
