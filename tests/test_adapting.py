"""Adapters in models: what else trains, what is refused, and how they meet healing and finetuning."""

import copy

import pytest
import torch
from mixtures import MIXTURES
from tiny import gpt2, ids, llama
from torch import nn

import rankwise
from rankwise import CalibrationError, adapters
from rankwise.compressors import PlainSvd
from rankwise.core.methods import Adapter
from rankwise.models.adapter_files import TENSORS
from rankwise.rank_rules import ExplainedVariance


def batches() -> list[torch.Tensor]:
    return list(ids().split(2))


@pytest.mark.parametrize(
    ("also", "message"),
    [
        (lambda name: "mlp" in name, r"'also' accepts model\.layers\.0\.mlp\.gate_proj\.weight"),
        (lambda name: "nrom" in name, "'also' accepts no parameter"),
    ],
)
def test_what_else_trains_is_no_adapted_weight_and_is_there(also, message: str):
    model = llama()
    with pytest.raises(ValueError, match=message):
        rankwise.adapt(model, adapters.Lora(rank=2), where=lambda name, _: "mlp" in name, also=also)
    assert not rankwise.core.surgery.structured(model)


@pytest.mark.parametrize(
    "method",
    [
        adapters.AdaLora(rank=2, target=1),
        adapters.Bat(block=2),
        adapters.Eva(rank=2),
        adapters.KronLora(count=2, rank=2),
        adapters.Lamda(rank=2),
        adapters.Loldu(rank=2),
        adapters.Lora(rank=2),
        adapters.Pissa(rank=2),
        adapters.Sst(rank=2),
        adapters.Svfit(rank=2),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_gate_too_small_is_left_out_where_nobody_named_it(method: Adapter):
    gate = "model.layers.0.mlp.shared_expert_gate"
    data = batches() if method.needs else None
    report = rankwise.adapt(MIXTURES["qwen2 moe"](), method, data=data)
    assert f"left out, too small or not reached by data: {gate}" in report.title
    assert list(report.totals["left_out"]) == [
        name for name, _ in MIXTURES["qwen2 moe"]().named_modules() if name.endswith("shared_expert_gate")
    ]
    assert not any(row["name"].endswith("shared_expert_gate") for row in report.rows)
    with pytest.raises(ValueError, match=r"shared_expert_gate: .* Or leave the layer out with 'where'"):
        rankwise.adapt(
            MIXTURES["qwen2 moe"](), method, where=lambda name, _: name.endswith("shared_expert_gate"), data=data
        )


def test_layers_that_no_data_reaches_are_left_out_where_nobody_named_them():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x)

    data = [torch.randn(64, 8)]
    for method in (adapters.Eva(rank=2), adapters.Lora(rank=2, ranks=ExplainedVariance())):
        report = rankwise.adapt(Partly(), method, data=data)
        assert [row["name"] for row in report.rows] == ["used"]
        assert report.totals["left_out"] == {"unused": "no data reached it."}
        assert "not reached by data: unused" in report.title
        with pytest.raises(CalibrationError, match="never reached by the data: unused;"):
            rankwise.adapt(Partly(), method, data=data, where=lambda *_: True)


def test_a_rank_too_large_for_all_layers_is_refused():
    for method in (adapters.Lora(rank=1000), adapters.Eva(rank=1000), adapters.Svfit(rank=1000)):
        model = llama()
        with pytest.raises(ValueError, match=r"all layers are too small, .*\. Layer model\.layers\.0.*1000"):
            rankwise.adapt(model, method, data=batches() if method.needs else None)
        assert not rankwise.core.surgery.structured(model)
        assert all(p.requires_grad for p in model.parameters())


def test_what_trains_whole_is_not_adapted_where_nobody_named_it():
    model = llama()
    report = rankwise.adapt(model, adapters.Lora(rank=2), also=lambda name: "mlp.up_proj" in name)
    assert len(report.rows) == 2 * 6
    assert not any("up_proj" in row["name"] for row in report.rows)
    assert model.model.layers[0].mlp.up_proj.weight.requires_grad


def test_other_parameters_train_whole():
    model = llama()
    rankwise.adapt(model, adapters.Lora(rank=2), also=lambda name: "norm" in name)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "norm" in name} == {n for n, _ in model.named_parameters() if "norm" in n}


def test_a_bias_that_trains_outlives_an_adapter_that_ends_empty(tmp_path):
    model, x = gpt2(), ids()
    again = copy.deepcopy(model)
    method = adapters.AdaLora(rank=2, target=1, every=1, warmup=0.0, tail=0.2)
    rankwise.adapt(model, method, also=lambda name: name.endswith("bias"))
    rankwise.finetune(model, batches(), held_out=0.3, steps=12, lr=3e-2)
    rankwise.save(model, tmp_path / "adapter", format="rankwise")
    rankwise.load_adapter(again, tmp_path / "adapter")
    assert (tmp_path / "adapter" / TENSORS).is_file()
    torch.testing.assert_close(again.eval()(x).logits, model.eval()(x).logits, rtol=0, atol=1e-6)


def test_what_is_under_an_adapter_is_not_trained_by_others():
    model = llama()
    rankwise.compress(model, PlainSvd(), keep=0.8)
    rankwise.adapt(model, adapters.Lora(rank=2))
    with pytest.raises(ValueError, match="has an adapter"):
        rankwise.trainable_low_rank(model)


def test_an_optimizer_made_too_early_is_refused():
    model = llama()
    early = torch.optim.AdamW(model.parameters())
    rankwise.adapt(model, adapters.Lora(rank=2))
    with pytest.raises(ValueError, match=r"lacks .*left, which asks for gradients"):
        rankwise.finetune(model, batches(), held_out=0.3, steps=1, optimizer=early)


def test_a_schedule_has_no_early_end():
    model = llama()
    rankwise.adapt(model, adapters.AdaLora(rank=2, target=1))
    with pytest.raises(ValueError, match="leave patience out"):
        rankwise.finetune(model, batches(), held_out=0.3, steps=4, patience=1)


def test_a_start_that_nothing_beats_keeps_its_buffers():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    rankwise.adapt(net, adapters.Lora(rank=2), also=lambda name: name.startswith("1."))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    data = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(4)]
    report = rankwise.finetune(net, data, held_out=data[:1], steps=2, lr=1e3)
    assert not report.totals["improved"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_options_that_bottlenecks_do_not_read_are_refused():
    for options in ({"embeddings": True}, {"data": "self"}):
        with pytest.raises(ValueError, match="reads no data"):
            rankwise.adapt(llama(), adapters.Compacter(count=2, reduction=4), **options)


def test_a_rank_above_a_layer_is_refused_with_a_rule_too():
    with pytest.raises(ValueError, match="rank"):
        rankwise.adapt(llama(), adapters.Eva(rank=1000), data=batches())
