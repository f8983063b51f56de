"""Narrower models: what is found in an architecture, what leaves, and what is left whole."""

import copy
import subprocess
import sys

import pytest
import torch
import transformers as families
from tiny import llama
from torch import Tensor, nn

import rankwise
from rankwise import narrow, narrowing
from rankwise.compressors import KroneckerFactoredSvd, PlainSvd
from rankwise.compressors.loss_metric import Regularisers
from rankwise.core.statistics import InputGram, InputMean, OutputGradGram
from rankwise.core.surgery import select
from rankwise.models import exchange
from rankwise.models.widths import find_widths

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IDS = torch.randint(64, (8, 32), generator=torch.Generator().manual_seed(5))
EXACT = Regularisers(input_shrinkage=0, input_damping=1e-9, output_damping=1e-3)
BOS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}


def lm(name: str, **changes) -> families.PreTrainedModel:
    """A random language model of a family."""
    config = getattr(families, f"{name}Config")(**{"vocab_size": 64, **BOS, **SIZES, **changes})
    kind = getattr(families, f"{name}ForCausalLM", None) or getattr(families, f"{name}Model")
    return fresh(kind, config)


def fresh(kind: type, config: families.PretrainedConfig) -> families.PreTrainedModel:
    """A model with weights and biases that all matter."""
    torch.manual_seed(1)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter += 0.1 * noise if parameter.dim() == 1 else 0.7 * noise / parameter.shape[-1] ** 0.5
    return model


def gpt2() -> families.PreTrainedModel:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 64}
    return fresh(families.GPT2LMHeadModel, families.GPT2Config(**sizes, **BOS))


def vit() -> families.PreTrainedModel:
    return fresh(families.ViTModel, families.ViTConfig(**SIZES, image_size=8, patch_size=4))


MODELS = {
    "llama": lambda: fresh(families.LlamaForCausalLM, llama().config),
    "qwen2": lambda: lm("Qwen2", num_key_value_heads=2),
    "gemma": lambda: lm("Gemma", num_key_value_heads=2, head_dim=16),
    "mistral": lambda: lm("Mistral", num_key_value_heads=1),
    "phi3": lambda: lm("Phi3", num_key_value_heads=2),
    "olmo2": lambda: lm("Olmo2", num_key_value_heads=2),
    "mixtral": lambda: lm("Mixtral", num_key_value_heads=2, num_local_experts=4),
    "gpt2": gpt2,
    "neox": lambda: lm("GPTNeoX"),
    "bert": lambda: lm("Bert"),
    "vit": vit,
}
MLP = {"intermediate_size": 48}
FOUND = {  # per family: the numbers that can shrink
    "llama": {**MLP, "num_key_value_heads": 2},
    "qwen2": {**MLP, "num_key_value_heads": 2},
    "gemma": {**MLP, "num_key_value_heads": 2},
    "mistral": {**MLP, "num_attention_heads": 4},  # all queries share one key-value head
    "phi3": MLP,  # one matrix holds queries, keys and values, in unequal parts
    "olmo2": MLP,  # norms of queries and keys reach over all heads
    "mixtral": {"num_key_value_heads": 2},  # the neurons of experts stay
    "gpt2": {"n_inner": 128},  # None in the config
    "neox": MLP,
    "bert": MLP,
    "vit": {**MLP, "num_attention_heads": 4},
}


def inputs(model: families.PreTrainedModel) -> Tensor:
    if model.main_input_name == "input_ids":
        return IDS
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)[0]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, Tensor], config: dict) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model.config.to_dict() == config


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_what_can_shrink_is_found(name: str):
    model = MODELS[name]()
    before, config = state(model), model.config.to_dict()
    widths = find_widths(model, select(model), inputs(model))
    assert {width.name: width.count for width in widths} == FOUND[name]
    assert all(len(width.blocks) == 2 for width in widths)
    assert_same(model, before, config)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("llama", "gpt2") else pytest.mark.slow) for name in MODELS]
)
def test_a_narrowed_model_is_an_ordinary_one(name: str, tmp_path):
    model, x = MODELS[name](), inputs(MODELS[name]())
    keep = 0.95 if name == "mixtral" else 0.8  # its experts, most of it, stay as they are
    report = narrow(model, keep=keep, data=[x], multiple_of=8)
    assert any(after < before for before, after in report.totals["widths"].values())
    assert report.totals["keep"]["params"] <= keep
    dense = sum(site.weight.numel() for site in select(MODELS[name]()).values())
    assert sum(site.weight.numel() for site in select(model).values()) / dense == report.totals["keep"]["params"]
    rankwise.save(model, tmp_path / "small")
    loaded = type(model).from_pretrained(tmp_path / "small")
    assert not hasattr(loaded.config, "quantization_config")
    torch.testing.assert_close(outputs(loaded, x), outputs(model, x), rtol=0, atol=0)


def kept_inputs(dense: nn.Module, small: nn.Module, name: str) -> Tensor:
    """Which inputs of a consumer are left, found from the rows of a matrix that makes them."""
    (width,) = [w for w in find_widths(dense, select(dense), inputs(dense)) if name in w.blocks]
    cuts = width.blocks[name]
    maker = next(key for key in cuts if key.endswith("weight") and key != f"{name}.weight")
    old, new = dense.get_parameter(maker), small.get_parameter(maker)
    axis = cuts[maker].axis
    rows = {tuple(row.flatten().tolist()) for row in new.unbind(axis)}
    entries = [tuple(row.flatten().tolist()) in rows for row in old.unbind(axis)]
    units = torch.tensor(entries).view(width.count, -1)[:, 0].nonzero()[:, 0]
    return cuts[f"{name}.weight"].places(units)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "bert", "vit"])
def test_new_matrices_and_their_errors_are_those_of_the_formula(name: str):
    model = MODELS[name]()
    dense = copy.deepcopy(model)
    batches = [inputs(model)]
    statistics = rankwise.calibrate(model, (InputGram, InputMean, OutputGradGram), data=batches)
    where = (lambda path, _: "mlp" not in path) if name == "qwen2" else None
    rows = narrow(model, keep=0.75, data=batches, multiple_of=8, where=where).rows
    shrunk = [row for row in rows if row["units_after"] < row["units_before"]]
    assert shrunk
    for row in shrunk:
        site, small = select(dense)[row["name"]], select(model)[row["name"]]
        moments = statistics.layers[row["name"]]
        c, s = moments[InputGram].value(), moments[OutputGradGram].value()
        mean = moments[InputMean].value()
        if not site.unbiased:  # the mean of what is dropped has gone to the bias
            c = c - mean[:, None] * mean
        c = 0.95 * c + 0.05 * c.diagonal().diag()
        c += 1e-6 * c.diagonal().mean() * torch.eye(len(c))
        s += 0.05 * s.diagonal().mean() * torch.eye(len(s))
        kept = kept_inputs(dense, model, row["name"])
        weight = site.weight.double()
        expected = weight @ c[:, kept] @ torch.linalg.inv(c[kept][:, kept])
        torch.testing.assert_close(small.weight.double(), expected, rtol=1e-4, atol=1e-6)
        change = weight.clone()
        change[:, kept] -= expected
        error = float(torch.trace(s @ change @ c @ change.mT)) / 2
        assert row["predicted_error"] == pytest.approx(error, rel=1e-4)
        assert row["measured_error"] == pytest.approx(error, rel=1e-4)
        if not site.unbiased:
            moved = small.layer.bias.double() - site.layer.bias.double()
            torch.testing.assert_close(moved, change @ mean, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_the_widths_are_the_best_of_all_within_the_budget():
    model = MODELS["llama"]()
    statistics = rankwise.calibrate(model, KroneckerFactoredSvd.needs, data=IDS)
    shares = {}
    for word, counts in (("mlp", (16, 32, 48)), ("attn", (1, 2))):
        for i, count in enumerate(counts):
            share = (i + 1) / len(counts)
            report = narrow(copy.deepcopy(model), keep=share, data=statistics, multiple_of=16, where=only(word))
            assert [after for _, after in report.totals["widths"].values()] == [count]
            left = sum(row["params_after"] for row in report.rows)
            shares[word, count] = left, sum(row["predicted_error"] for row in report.rows)
    total = shares["mlp", 48][0] + shares["attn", 2][0]
    for keep in (0.5, 0.6, 0.7, 0.8):
        report = narrow(copy.deepcopy(model), keep=keep, data=statistics, multiple_of=16)
        best = min(
            shares["mlp", neurons][1] + shares["attn", heads][1]
            for neurons in (16, 32, 48)
            for heads in (1, 2)
            if shares["mlp", neurons][0] + shares["attn", heads][0] <= keep * total
        )
        assert sum(row["predicted_error"] for row in report.rows) == pytest.approx(best, rel=1e-6)


def only(word: str):
    return lambda name, _: word in name


def spoiled(kind: str) -> families.PreTrainedModel:
    """A Llama with half its neurons and one of two groups of heads of no use of their own."""
    model = MODELS["llama"]()
    with torch.no_grad():
        for layer in model.model.layers:
            mlp, attention = layer.mlp, layer.self_attn
            if kind == "dead":
                mlp.up_proj.weight[::2] = 0
                attention.v_proj.weight[:8] = 0
            elif kind == "unread":
                mlp.down_proj.weight[:, ::2] = 0
                attention.o_proj.weight[:, :16] = 0
            else:
                for matrix in (mlp.up_proj, mlp.gate_proj):
                    matrix.weight[::2] = matrix.weight[1::2]
                if kind == "scaled":
                    mlp.up_proj.weight[::2] *= -3
                for matrix in (attention.q_proj, attention.k_proj, attention.v_proj):
                    matrix.weight[: len(matrix.weight) // 2] = matrix.weight[len(matrix.weight) // 2 :]
    return model


@pytest.mark.parametrize("kind", ["dead", "unread", "doubled", "scaled"])
def test_units_of_no_use_of_their_own_leave_without_a_trace(kind: str):
    model = spoiled(kind)
    logits = outputs(model, IDS)
    report = narrow(model, keep=0.5, data=IDS, multiple_of=24, regularisers=EXACT)
    assert report.totals["widths"] == {"intermediate_size": [48, 24], "num_key_value_heads": [2, 1]}
    torch.testing.assert_close(outputs(model, IDS), logits, rtol=1e-5, atol=1e-5 * float(logits.abs().max()))


def test_keep_one_changes_nothing():
    model = MODELS["llama"]()
    before, config = state(model), model.config.to_dict()
    report = narrow(model, keep=1, data=IDS)
    assert report.totals["keep"]["params"] == 1
    assert all(row["params_after"] == row["params_before"] for row in report.rows)
    assert_same(model, before, config)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types_and_flags_last(dtype: torch.dtype):
    model = MODELS["qwen2"]().to(dtype)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    model.train()
    narrow(model, keep=0.5, data=IDS, multiple_of=8)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [
        "model.layers.0.mlp.up_proj.weight"
    ]
    assert model.training


def test_it_reads_like_a_model_and_generates():
    model = MODELS["qwen2"]()
    narrow(model, keep=0.5, data=IDS, multiple_of=8, where=only("attn"))
    assert model.config.num_key_value_heads == 1
    attention = model.model.layers[0].self_attn
    assert (attention.q_proj.out_features, attention.k_proj.out_features, attention.o_proj.in_features) == (
        16,
        8,
        16,
    )
    whole = model.generate(IDS[:1, :4], max_new_tokens=8, do_sample=False)
    again = whole[:, :4]
    for _ in range(8):
        again = torch.cat([again, outputs(model, again)[:, -1:].argmax(-1)], 1)
    assert torch.equal(whole, again)


def test_self_calibration_draws_from_the_model(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path))
    model = MODELS["llama"]()
    report = narrow(model, keep=0.8, tokens=128, window=32, multiple_of=8)
    assert report.totals["keep"]["params"] <= 0.8


def test_compression_may_follow(tmp_path):
    model = MODELS["llama"]()
    narrow(model, keep=0.8, data=IDS, multiple_of=8)
    rankwise.compress(model, PlainSvd(), keep=0.7)
    rankwise.save(model, tmp_path / "small")
    loaded = families.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(outputs(loaded, IDS), outputs(model, IDS))
    with pytest.raises(ValueError, match="narrow a model before it is compressed"):
        narrow(loaded, keep=0.9, data=IDS, multiple_of=8)


@pytest.mark.slow
def test_plain_transformers_loads_it(tmp_path):
    model = MODELS["qwen2"]()
    narrow(model, keep=0.5, data=IDS, multiple_of=8)
    rankwise.save(model, tmp_path / "small")
    torch.save({"ids": IDS, "logits": outputs(model, IDS)}, tmp_path / "expected.pt")
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "folder = sys.argv[1]\n"
        "expected = torch.load(folder + '/expected.pt')\n"
        "model = AutoModelForCausalLM.from_pretrained(folder + '/small')\n"
        "with torch.no_grad(): logits = model(expected['ids'])[0]\n"
        "assert 'rankwise' not in sys.modules\n"
        "assert torch.equal(logits, expected['logits'])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_an_interrupt_on_the_way_leaves_the_model_whole(monkeypatch):
    model = MODELS["llama"]()
    before, config, logits = state(model), model.config.to_dict(), outputs(model, IDS)
    put, calls, last = exchange._put, [], [0]

    def interrupted(changes):
        calls.append(len(changes))
        if len(calls) == last[0]:
            put(changes[: len(changes) // 2])
            raise KeyboardInterrupt
        put(changes)

    monkeypatch.setattr(exchange, "_put", interrupted)
    narrow(copy.deepcopy(model), keep=0.8, data=IDS, multiple_of=8)
    changing = range(1, len(calls) + 1, 2)  # every second call puts values back
    for last[0] in (changing[0], changing[-2], changing[-1]):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            narrow(model, keep=0.8, data=IDS, multiple_of=8)
        assert_same(model, before, config)
        torch.testing.assert_close(outputs(model, IDS), logits, rtol=0, atol=0)


def test_numbers_that_transformers_does_not_read_are_left_out():
    model = lm("Llama", hidden_size=48, num_attention_heads=6, num_key_value_heads=6)
    report = narrow(model, keep=0.75, data=IDS, where=only("attn"))  # 48 is no multiple of 5 or 4 / 6 of heads
    assert report.totals["widths"] == {"num_attention_heads": [6, 4]}
    type(model.config).from_dict(model.config.to_dict())


def plain() -> nn.Module:
    return nn.Linear(4, 4)


def with_nan() -> families.PreTrainedModel:
    model = MODELS["llama"]()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("model", "options", "kind", "message"),
    [
        (MODELS["llama"], {"keep": 0}, ValueError, "keep must be > 0"),
        (MODELS["llama"], {"keep": 1.1}, ValueError, "keep must be > 0"),
        (MODELS["llama"], {"multiple_of": 0}, ValueError, "multiple_of must be >= 1"),
        (MODELS["llama"], {"keep": 0.01}, ValueError, r"cannot be met: .*keep must be at least 0\.4000"),
        (MODELS["llama"], {"data": "topics"}, ValueError, "data must be 'self'"),
        (MODELS["llama"], {"where": only("q_proj")}, ValueError, "no number in the config of LlamaForCausalLM"),
        (MODELS["vit"], {"data": IDS}, ValueError, "takes more than token ids; give data as a list"),
        (plain, {}, TypeError, "must be one of transformers, got Linear"),
        (with_nan, {}, ValueError, r"layers\.1\.mlp\.up_proj: its weight holds NaN"),
        (lambda: lm("Llama", num_hidden_layers=1), {}, ValueError, "has no list of blocks"),
    ],
)  # fmt: skip
def test_bad_input_is_named(model, options, kind, message):
    made = model()
    before = state(made)
    with pytest.raises(kind, match=message):
        narrow(made, **{"keep": 0.8, "data": IDS, "multiple_of": 16, **options})
    assert all(
        torch.equal(tensor, before[name]) or tensor.isnan().any() for name, tensor in made.state_dict().items()
    )


def test_what_is_refused_late_leaves_the_model_whole(monkeypatch):
    model = MODELS["llama"]().double()  # in its own precision nothing may be copied by accident
    before, config = state(model), model.config.to_dict()
    monkeypatch.setattr(narrowing, "same_outputs", lambda *_: False)
    with pytest.raises(ValueError, match="computes something else"):
        narrow(model, keep=0.8, data=IDS, multiple_of=8)
    assert_same(model, before, config)


def test_blocks_that_share_are_refused():
    model = MODELS["llama"]()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    before, config = state(model), model.config.to_dict()
    with pytest.raises(ValueError, match="are one parameter"):
        narrow(model, keep=0.8, data=IDS, multiple_of=8)
    assert_same(model, before, config)


@pytest.mark.slow
def test_the_other_half_of_a_model_keeps_its_numbers(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    half = [families.BertConfig(**sizes, num_hidden_layers=count) for count in (2, 4)]
    torch.manual_seed(0)
    joined = families.EncoderDecoderConfig.from_encoder_decoder_configs(*half)
    model = families.EncoderDecoderModel(joined).eval()
    batch = {"input_ids": IDS, "decoder_input_ids": IDS}
    narrow(model, keep=0.9, data=[batch], multiple_of=8, labels=rankwise.core.labels.sampled)
    assert model.config.decoder.intermediate_size < model.config.encoder.intermediate_size == 48
    rankwise.save(model, tmp_path / "small")
    loaded = families.EncoderDecoderModel.from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
