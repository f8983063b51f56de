"""The verbs on whole models: language models, encoders, convolutions, and everything that may go wrong."""

import math

import pytest
import torch
from tiny import gpt2, llama
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

import rankwise
from rankwise import CalibrationError, allocators
from rankwise.compressors import Gptq, KroneckerFactoredSvd, Lord, PlainSvd, WhitenedSvd
from rankwise.compressors.low_bit import LowBit
from rankwise.compressors.truncation import TruncatedSvd
from rankwise.core.surgery import StructuredLinear, structured

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
KINDS = [getattr(rankwise.compressors, name) for name in rankwise.compressors.__all__]
METHODS = [kind() for kind in KINDS] + [kind(gauge="factors") for kind in KINDS if issubclass(kind, TruncatedSvd)]
NAMES = [type(method).__name__ + getattr(method, "gauge", "") for method in METHODS]


def unit_of(method) -> str:
    """What the method makes smaller."""
    return "bytes" if isinstance(method, LowBit) else "params"


def ids(tokens: int = 512) -> Tensor:
    return torch.randint(0, 64, (tokens,), generator=torch.Generator().manual_seed(1))


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 24, 3),
        nn.Flatten(),
        nn.Linear(24 * 36, 10),
    )


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_a_language_model_keeps_what_it_says(method):
    model = llama()
    report = rankwise.compress(model, method, keep=0.75, data=ids(), of=unit_of(method))
    assert len(report.rows) == 14
    before = sum(row["params_before"] for row in report.rows)
    after = sum(row["params_after"] for row in report.rows)
    assert report.totals["keep"]["params"] == pytest.approx(after / before)
    assert 0.6 < report.totals["keep"][unit_of(method)] <= 0.75
    layers = structured(model)
    assert layers
    for row in report.rows:
        assert row["predicted_error"] == pytest.approx(row["measured_error"], rel=1e-3, abs=1e-9)
        if row["kind"] != "Dense":
            layer = layers[row["name"]]
            added = layer.bias.numel() if layer.biased else 0
            assert layer.matrix.params + added == row["params_after"]
            assert unit_of(method) == "bytes" or row["params_after"] < row["params_before"]
    assert model(ids(16)[None]).logits.isfinite().all()


@pytest.mark.parametrize("of", ["params", "bytes", "macs"])
@pytest.mark.parametrize("allocate", [getattr(allocators, name) for name in allocators.__all__])
def test_every_budget_is_met(of, allocate):
    report = rankwise.compress(llama(), KroneckerFactoredSvd(), keep=0.7, data=ids(), of=of, allocate=allocate)
    assert 0.5 < report.totals["keep"][of] <= 0.7


def test_low_bits_do_not_count_as_fewer_numbers():
    with pytest.raises(ValueError, match="smaller in bytes alone"):
        rankwise.compress(llama(), Gptq(), keep=0.7, data=ids())


def test_tied_embeddings_and_the_head_are_left_alone():
    tied, untied = llama(), llama(tie_word_embeddings=False)
    for model in (tied, untied):
        rankwise.compress(model, PlainSvd(), keep=0.5)
        assert type(model.lm_head) is nn.Linear
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_grouped_query_layers_get_ranks_of_their_own():
    report = rankwise.compress(llama(), WhitenedSvd(gauge="factors"), keep=0.5, data=ids())
    ranks = {row["name"].split(".")[-1]: row["rank"] for row in report.rows}
    assert ranks["q_proj"] == 8  # 0.5 * 32 * 32 / (32 + 32)
    assert ranks["k_proj"] == 5  # 0.5 * 16 * 32 / (16 + 32)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize("kind", ["eight tokens", "one token again and again", "a dead feature"])
def test_poor_statistics_do_no_harm(method, kind):
    model, data = llama(), ids(8)
    if kind == "one token again and again":
        data = torch.full((256,), 5)
    elif kind == "a dead feature":
        data = ids()
        for layer in model.model.layers:
            layer.input_layernorm.weight.data[3] = 0
            layer.post_attention_layernorm.weight.data[3] = 0
    rankwise.compress(model, method, keep=0.7, data=data, of=unit_of(method))
    assert model(ids(32)[None]).logits.isfinite().all()


def test_an_encoder_compresses():
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SMALL, num_attention_heads=4, max_position_embeddings=64)).eval()
    batch = {"input_ids": ids(64).view(4, 16), "attention_mask": torch.ones(4, 16, dtype=torch.long)}
    batch["attention_mask"][:, 12:] = 0
    with torch.no_grad():
        before = model(**batch).last_hidden_state
        report = rankwise.compress(model, KroneckerFactoredSvd(), keep=0.9, data=[batch])
        after = model(**batch).last_hidden_state
    assert report.totals["keep"]["params"] <= 0.9
    assert 0 < float((after - before)[:, :12].square().mean()) < 0.2 * float(before[:, :12].square().mean())


def test_gpt2_compresses_and_folds_back_to_its_own_layers():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=512, n_embd=32, n_layer=1, n_head=4)).eval()
    kind = type(model.transformer.h[0].mlp.c_fc)
    rankwise.compress(model, KroneckerFactoredSvd(), keep=0.8, data=ids(), allocate=allocators.uniform)
    logits = model(ids(16)[None]).logits
    assert isinstance(model.transformer.h[0].mlp.c_fc, StructuredLinear)
    rankwise.fold(model)
    assert type(model.transformer.h[0].mlp.c_fc) is kind
    torch.testing.assert_close(model(ids(16)[None]).logits, logits)


def test_convolutions_compress_towards_their_outputs():
    net, images = convolutions(), torch.randn(64, 3, 16, 16)
    with torch.no_grad():
        dense = net(images)
        errors = []
        for keep in (0.3, 0.9):
            small = convolutions()
            rankwise.compress(small, KroneckerFactoredSvd(), keep=keep, data=[images])
            errors.append(float((small(images) - dense).square().mean() / dense.square().mean()))
    assert errors[1] < 0.5 * errors[0] < 0.5


def test_shared_weights_are_compressed_once_and_stay_shared():
    net = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    net[2].weight = net[0].weight
    report = rankwise.compress(net, KroneckerFactoredSvd(), keep=0.6, data=[torch.randn(300, 16)])
    assert [row["name"] for row in report.rows] == ["0"]
    assert net[0].matrix is net[2].matrix


def test_statistics_are_collected_once_for_many_calls():
    model = llama()
    statistics = rankwise.calibrate(model, KroneckerFactoredSvd.needs, data=ids())
    first = rankwise.compress(llama(), KroneckerFactoredSvd(), keep=0.8, data=statistics)
    second = rankwise.compress(llama(), KroneckerFactoredSvd(), keep=0.8, data=ids())
    assert [row["rank"] for row in first.rows] == [row["rank"] for row in second.rows]
    with pytest.raises(CalibrationError, match="InputMagnitude was not collected"):
        rankwise.compress(llama(), rankwise.compressors.ActivationAwareSvd(), keep=0.8, data=statistics)


def test_no_data_at_all_works_on_a_language_model(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path))
    report = rankwise.compress(llama(), KroneckerFactoredSvd(), keep=0.8, tokens=256, window=64)
    assert report.totals["keep"]["params"] <= 0.8
    with pytest.raises(ValueError, match="not a causal language model"):
        rankwise.compress(convolutions(), KroneckerFactoredSvd(), keep=0.8)


def test_an_interrupt_leaves_the_model_whole(monkeypatch):
    model, calls = llama(), []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    build = rankwise.matrices.PivotedLowRank.from_factors

    def interrupted(*factors):
        calls.append(factors)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return build(*factors)

    monkeypatch.setattr(rankwise.matrices.PivotedLowRank, "from_factors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rankwise.compress(model, PlainSvd(), keep=0.5)
    assert not structured(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def broken() -> LlamaForCausalLM:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    return model


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (llama, {"keep": 0.0}, ValueError, "keep must be > 0"),
        (llama, {"keep": 1.5}, ValueError, "keep must be > 0 and <= 1, got 1.5"),
        (llama, {"keep": "0.5"}, ValueError, "keep must be > 0 and <= 1, got '0.5'"),
        (llama, {"keep": True}, ValueError, "keep must be > 0 and <= 1, got True"),
        (llama, {"where": "mlp"}, TypeError, "where must be a function of .name, module., or None, got 'mlp'"),
        (llama, {"allocate": "uniform"}, TypeError, "allocate must be a function from rankwise.allocators"),
        (llama, {"labels": "data"}, TypeError, "labels must be a function from rankwise.core.labels"),
        (llama, {"data": ids() + 64}, ValueError, "the data has token 127, but the vocabulary has 64 entries"),
        (llama, {"data": -ids()}, ValueError, "the data has token -63, but the vocabulary has 64"),
        (gpt2, {"window": 33}, ValueError, "window 33 is longer than the 32 positions of GPT2LMHeadModel"),
        (llama, {"of": "watts"}, ValueError, "of must be one of params, bytes, macs"),
        (llama, {"method": "svd"}, TypeError, r"rankwise\.compressors"),
        (llama, {"data": "text"}, ValueError, "tokenize a text first"),
        (llama, {"data": torch.zeros(0, dtype=torch.long)}, CalibrationError, "empty"),
        (llama, {"data": []}, CalibrationError, "empty"),
        (llama, {"data": torch.randn(8, 4)}, TypeError, "token ids"),
        (llama, {"where": lambda name, layer: False}, ValueError, "no layer was selected"),
        (llama, {"keep": 0.001}, ValueError, "cannot be met"),
        (torch.jit.ScriptModule, {}, TypeError, "it was made of"),
        (broken, {}, ValueError, r"layers\.1\.mlp\.up_proj: its weight holds NaN"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(model, options, error, message):
    model = model()
    call = {"method": KroneckerFactoredSvd(), "keep": 0.8, "data": ids(), **options}
    with pytest.raises(error, match=message):
        rankwise.compress(model, call.pop("method"), **call)
    assert not structured(model)


def test_other_verbs_name_what_is_no_function_or_object():
    with pytest.raises(TypeError, match=r"measures are objects from rankwise.measures, got 'rank'"):
        rankwise.inspect(llama(), ["rank"])
    with pytest.raises(TypeError, match="also must be a function of the name of a parameter"):
        rankwise.adapt(llama(), rankwise.adapters.Lora(), also="bias")
    with pytest.raises(TypeError, match=r"estimator must be an object from rankwise.estimators"):
        rankwise.estimate(llama(), "target")
    with pytest.raises(CalibrationError, match="reads statistics"):
        rankwise.adapt(llama(), rankwise.adapters.Eva())


def test_positions_that_begin_anew_may_be_more_than_the_model_has():
    places = torch.arange(32).repeat(1, 2)
    batch = {"input_ids": ids()[None, :64], "position_ids": places}
    rankwise.calibrate(gpt2(), KroneckerFactoredSvd.needs, data=[batch])
    with pytest.raises(ValueError, match="window 33 is longer"):
        rankwise.calibrate(gpt2(), KroneckerFactoredSvd.needs, data=[{**batch, "position_ids": places + 1}])


@pytest.mark.parametrize("verb", ["heal", "finetune", "train", "compress_folder"])
def test_every_verb_checks_the_tokens(verb, tmp_path):
    model, data = gpt2(), torch.full((300, 8), 64)
    calls = {
        "heal": lambda: rankwise.heal(model, gpt2(), data=data, steps=1),
        "finetune": lambda: rankwise.finetune(model, data, steps=1),
        "train": lambda: rankwise.train(model, data, torch.optim.SGD(model.parameters(), lr=0.1), steps=1),
        "compress_folder": lambda: rankwise.compress_folder(
            tmp_path / "dense", tmp_path / "out", KroneckerFactoredSvd(), keep=0.5, data=data
        ),
    }
    if verb == "heal":
        rankwise.compress(model, PlainSvd(), keep=0.5)
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="the data has token 64, but the vocabulary has 64 entries"):
        calls[verb]()


def test_fold_needs_something_to_fold():
    with pytest.raises(ValueError, match="no structured layer"):
        rankwise.fold(llama())


def test_fold_forgets_the_specs_but_not_the_config_of_another_method(tmp_path):
    model = llama()
    rankwise.compress(model, PlainSvd(), keep=0.7)
    loaded, _ = rankwise.load(rankwise.save(model, tmp_path / "small"))
    assert loaded.config.quantization_config.quant_method == "rankwise"
    assert getattr(rankwise.fold(loaded).config, "quantization_config", None) is None
    model.config.quantization_config = {"quant_method": "other"}
    assert rankwise.fold(model).config.quantization_config == {"quant_method": "other"}


def test_inspect_measures_every_layer():
    report = rankwise.inspect(llama())
    assert len(report.rows) == 14
    assert {"name", "shape", "params"} < set(report.rows[0])
    assert len(report.curves[report.rows[0]["name"]]) == 32
    report.to_json()


def test_inspect_measures_what_structured_layers_stand_for():
    model = llama()
    rankwise.compress(model, PlainSvd(), keep=0.4, where=lambda name, layer: "mlp" in name)
    found = {row["name"]: row["condition"] for row in rankwise.inspect(model).rows}
    assert {name: value is None for name, value in found.items()} == {name: "mlp" in name for name in found}
    assert len(found) == 14


def test_a_layer_that_is_the_model_cannot_be_replaced():
    with pytest.raises(ValueError, match=r"put it into an nn\.Sequential"):
        rankwise.compress(nn.Linear(32, 32), PlainSvd(), keep=0.5)


@pytest.mark.parametrize("n", [7, 10, 13, 29])
def test_the_least_budget_that_is_told_is_met(n: int):
    net = nn.Sequential(nn.Linear(n, n + 3, bias=False))
    with pytest.raises(ValueError, match="keep must be at least") as caught:
        rankwise.compress(net, PlainSvd(), keep=1e-3)
    least = float(str(caught.value).split()[-1].rstrip("."))
    assert rankwise.compress(net, PlainSvd(), keep=least).totals["keep"]["params"] <= least


def test_what_is_frozen_stays_frozen():
    """Also beside an adapter, and once it is folded again."""
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
    net[0].requires_grad_(False)
    rankwise.compress(net, PlainSvd(), keep=0.8)
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    assert flags
    assert all(flag == name.startswith("2") for name, flag in flags.items())
    rankwise.fold(net)
    assert [layer.weight.requires_grad for layer in (net[0], net[2])] == [False, True]


def test_biases_that_a_method_gives_are_counted_in_each_place():
    layers = [nn.Linear(16, 16, bias=i == 0) for i in range(4)]
    for layer in layers[1:]:
        layer.weight = layers[0].weight
    net, data = nn.Sequential(*layers), [torch.randn(64, 16) for _ in range(3)]
    before = sum(p.numel() for p in net.parameters())
    report = rankwise.compress(net, Lord(), keep=0.9, data=data)
    stored = sum(p.numel() for p in net.parameters()) + sum(
        t.numel() for name, t in net[0].matrix.named_buffers() if not t.is_floating_point()
    )
    assert stored - before == round(256 * (report.totals["keep"]["params"] - 1))


def test_a_module_in_two_places_has_one_bias():
    layer = nn.Linear(16, 16, bias=False)
    net, data = nn.Sequential(layer, nn.Tanh(), layer), [torch.randn(64, 16) for _ in range(3)]
    rankwise.compress(net, Lord(), keep=0.9, data=data)
    assert net[0].bias is net[2].bias is not None
