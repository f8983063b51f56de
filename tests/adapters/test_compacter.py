"""Bottlenecks stand where blocks write into their stream, start as nothing, and share what they should."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from mixtures import MIXTURES
from safetensors.torch import load_file
from tiny import gpt2, ids, llama
from torch import Generator, Tensor, nn

import rankwise
from rankwise.adapters import Compacter, Lora
from rankwise.adapters.compacter import Bottleneck
from rankwise.core.extended import extended
from rankwise.core.insertion import writers
from rankwise.matrices import Hypercomplex

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 64}
LLAMA = ["self_attn.o_proj", "mlp.down_proj"]
POSITIONS: dict[str, tuple[Callable[[], Any], str, list[str]]] = {
    "llama": (llama, "model.layers.1", LLAMA),
    "gpt2": (gpt2, "transformer.h.1", ["attn.c_proj", "mlp.c_proj"]),
    "bert": (
        lambda: transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=64)),
        "encoder.layer.1",
        ["attention.output.dense", "output.dense"],
    ),
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
        "decoder.block.0.layer",
        ["0.SelfAttention.o", "1.EncDecAttention.o", "2.DenseReluDense.wo"],
    ),
    "mixtral": (MIXTURES["mixtral"], "model.layers.1", LLAMA[:1]),
}


def output(model: Any) -> Tensor:
    options = {"decoder_input_ids": ids()} if model.config.is_encoder_decoder else {}
    return model(ids(), **options)[0]


@pytest.mark.parametrize("family", POSITIONS)
def test_modules_stand_where_blocks_write_and_change_nothing_at_the_start(family: str):
    make, block, names = POSITIONS[family]
    model = make().eval()
    assert list(writers(model)[-1]) == [f"{block}.{name}" for name in names]
    before = output(model).detach()
    report = rankwise.adapt(model, Compacter(reduction=4))
    torch.testing.assert_close(output(model), before, rtol=0, atol=5e-6)
    assert [row["name"] for row in report.rows[-len(names) :]] == [f"{block}.{name}" for name in names]
    output(model).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("last", "positions"), [(False, 2), (True, 1)])
def test_counts_are_those_of_the_paper(last: bool, positions: int):
    """P (d + d / rho) twice a module, its biases d + d / rho, and k^3 once."""
    model, d, w, k = llama(), 32, 8, 4
    report = rankwise.adapt(model, Compacter(count=k, reduction=d // w, last=last))
    assert report.totals["trained"] == 2 * positions * (2 * (d + w) + d + w) + k**3
    assert sum(row["trained"] for row in report.rows) == report.totals["trained"]
    assert all(name.endswith("down_proj") or not last for name in extended(model))


def test_bottlenecks_compute_the_formula():
    (made,) = Compacter(reduction=2).modules({"x": torch.empty(16).double()}, Generator().manual_seed(0)).values()
    assert isinstance(made, Bottleneck)
    for p in made.parameters():
        p.data = torch.randn(p.shape, generator=Generator().manual_seed(p.numel()), dtype=torch.float64)
    h = torch.randn(3, 16, generator=Generator().manual_seed(1), dtype=torch.float64)

    def written(matrix: Hypercomplex) -> Tensor:
        return sum(torch.kron(a, s @ t) for a, s, t in zip(matrix.mixers, matrix.left, matrix.right, strict=True))

    z = h @ written(made.down).mT + made.inner_bias
    curved = 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))
    torch.testing.assert_close(made(h), h + curved @ written(made.up).mT + made.outer_bias)


def test_all_share_the_mixers_and_training_moves_only_what_is_new():
    model = llama()
    before = {name: p.clone() for name, p in model.named_parameters()}
    rankwise.adapt(model, Compacter(reduction=4))
    made = [module.after for module in extended(model).values()]
    mixers = {id(matrix.mixers) for module in made for matrix in (module.down, module.up)}
    assert len(mixers) == 1
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(trained, lr=0.01), []
    start = made[0].down.mixers.detach().clone()
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert not torch.equal(made[0].down.mixers, start)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, before[name.replace(".layer.weight", ".weight")])


def test_norms_train_too_where_asked():
    model = llama()
    own = rankwise.adapt(model, Compacter(reduction=4)).totals["trained"]
    model = llama()
    both = rankwise.adapt(model, Compacter(reduction=4), also=lambda name: "norm" in name).totals["trained"]
    assert both == own + sum(p.numel() for name, p in model.named_parameters() if "norm" in name)


def test_half_precision_and_autocast():
    model = llama().bfloat16()
    rankwise.adapt(model, Compacter(reduction=4))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert output(model).dtype == torch.bfloat16
    other = llama()
    rankwise.adapt(other, Compacter(reduction=4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = output(other)
    torch.testing.assert_close(y.float(), output(other), rtol=0, atol=0.1)


def test_a_compressed_layer_is_followed_too():
    model = llama()
    rankwise.compress(model, rankwise.compressors.PlainSvd(), keep=0.6)
    before = output(model).detach()
    rankwise.adapt(model, Compacter(reduction=4))
    torch.testing.assert_close(output(model), before)


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p += 0.1 * torch.randn(p.shape, generator=Generator().manual_seed(i))
    return model


def compressed() -> nn.Module:
    model = llama()
    rankwise.compress(model, rankwise.compressors.PlainSvd(), keep=0.6)
    return model


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "with LoRA inside"])
@pytest.mark.parametrize("make", [llama, gpt2, compressed])
def test_written_and_read_it_is_the_same(make: Callable[[], Any], inside: bool, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    again = copy.deepcopy(model)
    if inside:
        rankwise.adapt(model, Lora(rank=2))
    rankwise.adapt(model, Compacter(reduction=4), also=lambda name: ("norm" in name) or ("c_proj.bias" in name))
    for layer in rankwise.core.adapted.adapted(model).values():
        layer.matrix.members[1].requires_grad_(True)
    moved(model)
    rankwise.save(model, tmp_path / "out", format="rankwise")
    report = rankwise.load_adapter(again, tmp_path / "out")
    assert torch.equal(output(again), output(model))
    for one, two in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert one[0] == two[0]
        assert one[1].requires_grad == two[1].requires_grad
    made = [module.after for module in extended(again).values()]
    assert len({id(matrix.mixers) for module in made for matrix in (module.down, module.up)}) == 1
    assert report.totals["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    own = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert not own & load_file(tmp_path / "out" / "rankwise_adapter.safetensors").keys()


def damaged(change: Callable[[Any], object], folder) -> None:
    file = folder / "rankwise_adapter.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["modules"][0]["spec"].update(kind="Path"), "o_proj.* unknown kind of module"),
        (lambda c: c["modules"][0]["spec"].pop("up"), "mapping"),
        (lambda c: c["modules"][0]["spec"]["up"].update(shape=[8, 32]), "disagree"),
        (lambda c: c["modules"][0].pop("names"), "damaged entry"),
        (lambda c: c["modules"][0]["base"].update(shape=[4, 4]), "belongs to another model"),
        (lambda c: c["modules"][0]["base"].update(digest="0"), "made for other values of the layers under it: "),
        (lambda c: c["modules"].pop(), "nothing in this model reads"),
    ],
)
def test_a_damaged_file_is_refused(change: Callable[[Any], object], message: str, tmp_path):
    model = llama()
    rankwise.adapt(model, Compacter(reduction=4))
    rankwise.save(model, tmp_path / "out", format="rankwise")
    damaged(change, tmp_path / "out")
    fresh = llama()
    with pytest.raises(ValueError, match=message):
        rankwise.load_adapter(fresh, tmp_path / "out")
    assert not extended(fresh)
    assert all(p.requires_grad for p in fresh.parameters())


def test_what_cannot_be_folded_or_exported_says_so(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "base")
    rankwise.adapt(model, Compacter(reduction=4))
    with pytest.raises(ValueError, match=r"self_attn\.o_proj has a module behind it .* cannot be folded"):
        rankwise.fold(model)
    for form in ("model", "peft"):
        with pytest.raises(ValueError, match=r"no place in this format; give format='rankwise'"):
            rankwise.save(model, tmp_path / "out", format=form)
    folder = rankwise.save(model, tmp_path / "adapter", format="rankwise")
    for kind in (rankwise.exporters.Merged, rankwise.exporters.Lora, rankwise.exporters.Delta):
        for source in (folder, model):
            with pytest.raises(ValueError, match=r"module behind .*o_proj.* neither merged nor exported"):
                rankwise.export(source, kind(base=str(tmp_path / "base")), tmp_path / "out")
    with pytest.raises(ValueError, match="has a module behind it already"):
        rankwise.adapt(model, Compacter(reduction=4))
    with pytest.raises(ValueError, match=r"has a module behind it .* load the model anew"):
        rankwise.load_adapter(model, folder)


def test_where_chooses_other_layers_and_other_adapters_go_inside():
    model = llama()
    report = rankwise.adapt(model, Compacter(reduction=4), where=lambda name, _: name.endswith("q_proj"))
    assert [row["name"] for row in report.rows] == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert "model.layers.0.self_attn.q_proj.layer" in [
        row["name"] for row in rankwise.adapt(model, Lora(rank=2)).rows
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reduction": 32}, "bottleneck, 1"),
        ({"count": 5, "reduction": 4}, "count 5"),
        ({"reduction": 64}, ", 0;"),
    ],
)
def test_widths_that_do_not_fit_are_named(fields, message):
    model = llama()
    with pytest.raises(ValueError, match=f"o_proj: .*{message}"):
        rankwise.adapt(model, Compacter(**fields))
    assert not extended(model)
    assert all(p.requires_grad for p in model.parameters())


def test_bad_fields_and_models_without_blocks_are_refused():
    for name in ("count", "reduction", "rank"):
        with pytest.raises(ValueError, match=f"{name} must be an integer >= 1"):
            Compacter(**{name: 0})
    with pytest.raises(ValueError, match="has no blocks"):
        rankwise.adapt(nn.Sequential(nn.Linear(8, 8)), Compacter())
    with pytest.raises(ValueError, match="no linear layer that a module"):
        rankwise.adapt(nn.Sequential(nn.Conv2d(3, 8, 3)), Compacter(), where=lambda *_: True)


@pytest.mark.parametrize("reduction", [2, 4])
def test_its_sums_of_products_are_no_stacks_of_experts(reduction: int, tmp_path):
    model = llama()
    rankwise.adapt(model, Compacter(count=4, reduction=reduction, rank=2))
    rankwise.save(model, tmp_path / "compacter", format="rankwise")
    other = llama()
    rankwise.load_adapter(other, tmp_path / "compacter")
    torch.testing.assert_close(other(ids()).logits, model(ids()).logits, rtol=0, atol=0)
