"""Layers fitted one after the other equal those that a plain loop over whole models gives."""

import copy
from typing import Any

import pytest
import torch
import transformers
from mixtures import MIXTURES, mixture
from tiny import gpt2, ids, llama, padded, plain
from torch import Tensor, nn
from torch.nn import functional

import rankwise
from rankwise import CalibrationError
from rankwise.compressors import (
    KroneckerFactoredPruning,
    KroneckerFactoredSvd,
    Lord,
    Mixed,
    PlainSvd,
    WhitenedSvd,
)
from rankwise.core.statistics import InputGram
from rankwise.core.surgery import structured
from rankwise.matrices import Scaled
from rankwise.models import sequential

KEEP = 0.7
ORDER = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def inputs_of(model: nn.Module, name: str, data: Any) -> Tensor:
    """What enters a layer while the whole model runs, (t, n) float64."""
    rows = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows.append(inputs[0].detach())

    handle = model.get_submodule(name).register_forward_pre_hook(keep)
    with torch.no_grad():
        for batch in data:
            if isinstance(batch, Tensor):
                model(batch)
            else:
                model(**batch)
                rows[-1] = rows[-1][batch["attention_mask"].bool()]
    handle.remove()
    return torch.cat([x.flatten(0, -2) for x in rows]).double()


def statistic(kind: Any, x: Tensor, m: int) -> Any:
    found = kind(m, x.shape[1])
    found.update(x)
    return found


def nearer(weight: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """The change D of W with least E|W old - (W + D) new|^2 + a penalty, by ridge regression; rows are tokens."""
    power = new.square().mean(0)
    penalty = sequential.SHRINKAGE * power + sequential.DAMPING * power.mean()
    system = torch.cat([new * (1 - sequential.SHRINKAGE) ** 0.5, (len(new) * penalty).sqrt().diag()])
    wanted = torch.cat(
        [(old - new) @ weight.mT / (1 - sequential.SHRINKAGE) ** 0.5, torch.zeros(len(power), len(weight))]
    )
    return torch.linalg.lstsq(system, wanted).solution.mT


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("data", [plain, padded])
def test_each_layer_is_fitted_to_what_the_compressed_ones_before_it_make(data, strength):
    model, method = llama().double(), WhitenedSvd()
    dense, slow = copy.deepcopy(model), copy.deepcopy(model)
    report = rankwise.compress(model, method, keep=KEEP, data=data(), sequential=strength)
    ranks = {row["name"]: row["rank"] for row in report.rows}
    for block in range(2):
        for group in ORDER:
            names = [name for name in ranks if f"layers.{block}." in name and name.endswith(group)]
            new, old = (inputs_of(each, names[0], data()) for each in (slow, dense))
            for name in names:
                layer: Any = slow.get_submodule(name)
                weight = layer.weight.detach()
                target = weight + strength * nearer(weight, old, new)
                choices = method.choices(target, {InputGram: statistic(InputGram, new, len(weight))})
                layer.weight.data = choices.build(ranks[name] - 1).dense().detach()
                ours = structured(model)[name].matrix.dense()
                difference = ours.detach() - layer.weight.detach()
                assert float(choices.error_of(difference)) < 1e-7 * float(choices.total)
                if group != ("o_proj",):  # whose inputs lack directions, in which any weight will do
                    assert float(difference.abs().max()) < 2e-3 * float(weight.abs().max())


def test_the_first_layers_have_no_errors_to_make_up_for():
    method, before = KroneckerFactoredSvd(), "layers.0.self_attn.q_proj"
    models = [llama() for _ in range(2)]
    for model, flag in zip(models, (False, True), strict=True):
        report = rankwise.compress(model, method, keep=KEEP, data=plain(), sequential=flag)
        words = "fitted in order with strength 0.5"
        assert (words in report.title) is flag
    first = [{n: x.matrix.dense() for n, x in structured(model).items()} for model in models]
    assert torch.equal(*(each[f"model.{before}"] for each in first))
    assert not torch.equal(*(each["model.layers.1.mlp.down_proj"] for each in first))


@pytest.mark.slow
@pytest.mark.parametrize("method", [PlainSvd(), WhitenedSvd(), KroneckerFactoredPruning(), Mixed()], ids=str)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_the_outputs_come_nearer_to_the_dense_ones(build, method):
    torch.manual_seed(0)
    dense = build().eval()
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if "norm" not in name and "ln_" not in name and parameter.dim() == 2:
                parameter.mul_(4.0)  # layers that do something

    def distance(strength: Any) -> float:
        model = copy.deepcopy(dense)
        rankwise.compress(model, method, keep=0.4, data=plain(), sequential=strength)
        with torch.no_grad():
            pairs = [(model(batch).logits, dense(batch).logits) for batch in plain()]
        return float(torch.stack([functional.mse_loss(*pair) for pair in pairs]).mean())

    assert distance(1.0) < distance(False)


def test_an_interrupt_leaves_the_model_whole(monkeypatch):
    model = llama()
    before = copy.deepcopy(model.state_dict())
    seen = []

    def stop(*arguments: Any) -> None:
        seen.append(arguments)
        if len(seen) == 5:
            raise KeyboardInterrupt
        replace(*arguments)

    replace = sequential.replace
    monkeypatch.setattr(sequential, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        rankwise.compress(model, PlainSvd(), keep=KEEP, data=plain(), sequential=True)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model.config.use_cache


@pytest.mark.parametrize(
    ("layer", "what"),
    [
        (
            "layers.1.mlp.down_proj",
            r"compressed block model\.layers\.1 makes hidden states",
        ),  # the very last layer
        ("layers.0.mlp.up_proj", r"the compressed model makes inputs of model\.layers\.0\.mlp\.down_proj"),
    ],
)
def test_numbers_too_large_for_the_compressed_model_are_named(layer, what, monkeypatch):
    def put(model: Any, site: Any, matrix: Any) -> None:
        replace(model, site, Scaled(matrix, 3e38) if layer in site.name else matrix)

    replace = sequential.replace
    monkeypatch.setattr(sequential, "replace", put)
    with pytest.raises(CalibrationError, match=f"{what} that are not finite"):
        rankwise.compress(llama(initializer_range=1.0), PlainSvd(), keep=KEEP, data=plain(), sequential=True)


def test_any_chain_of_blocks_will_do():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(0)
    model, data = Plain(), [torch.randn(40, 8)]
    alone = copy.deepcopy(model)
    rankwise.compress(model, WhitenedSvd(), keep=0.8, data=data, sequential=True)
    rankwise.compress(alone, WhitenedSvd(), keep=0.8, data=data)
    ours, other = ([x.matrix.dense() for x in structured(each).values()] for each in (model, alone))
    assert [torch.equal(*pair) for pair in zip(ours, other, strict=True)] == [True, False, False]


def test_layers_outside_the_blocks_are_made_from_the_dense_inputs():
    model = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        )
    ).eval()
    alone = copy.deepcopy(model)
    for each, flag in ((model, True), (alone, False)):
        rankwise.compress(each, WhitenedSvd(), keep=KEEP, data=plain(), sequential=flag)
    ours, other = (structured(each)["pooler.dense"].matrix.dense() for each in (model, alone))
    assert torch.equal(ours, other)


EVERY = {"mixtral, each token to each expert": mixture("Mixtral", num_local_experts=2, num_experts_per_tok=2)}


@pytest.mark.slow
@pytest.mark.parametrize("make", [*MIXTURES.values(), *EVERY.values()], ids=[*MIXTURES, *EVERY])
def test_experts_are_made_from_the_dense_inputs_and_what_follows_sees_them(make):
    dense = make()
    model, alone = copy.deepcopy(dense), copy.deepcopy(dense)
    rankwise.compress(model, WhitenedSvd(), keep=KEEP, data=plain(), sequential=True)
    rankwise.compress(alone, WhitenedSvd(), keep=KEEP, data=plain())
    ours, other = ({n: x.matrix.dense() for n, x in structured(each).items()} for each in (model, alone))
    experts = [name for name in ours if ".experts." in name]
    assert experts
    assert all(torch.equal(ours[name], other[name]) for name in experts)
    later = "model.layers.1.self_attn.q_proj"
    assert not torch.equal(ours[later], other[later])
    where = lambda name, _: ".experts." in name or name == later  # noqa: E731
    partly = copy.deepcopy(dense)
    rankwise.compress(partly, WhitenedSvd(), keep=KEEP, data=plain(), sequential=True, where=where)
    assert not torch.equal(structured(partly)[later].matrix.dense(), other[later])


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="sequential must be"):
        rankwise.compress(llama(), WhitenedSvd(), keep=KEEP, data=plain(), sequential=1.5)
    with pytest.raises(ValueError, match="bias"):
        rankwise.compress(llama(), Lord(), keep=KEEP, data=plain(), sequential=True)
    no_chain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="blocks"):
        rankwise.compress(no_chain, WhitenedSvd(), keep=KEEP, data=[torch.randn(20, 8)], sequential=True)
    statistics = rankwise.calibrate(llama(), WhitenedSvd.needs, data=ids())
    kept = type(statistics)(statistics.layers, statistics.seconds, statistics.peak_memory_bytes)
    with pytest.raises(ValueError, match="give the data"):
        rankwise.compress(llama(), WhitenedSvd(), keep=KEEP, data=kept, sequential=True)
