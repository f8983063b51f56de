"""Adapters on embeddings: looked up, never multiplied by rows with a one."""

import pytest
import torch
from adapters.methods import METHODS
from contracts.examples import draw
from tiny import gpt2, ids, llama
from torch import nn
from torch.nn import functional

import rankwise
from rankwise import adapters
from rankwise.core.methods import Adapter
from rankwise.core.statistics import InputGram
from rankwise.initialisers import NormalOutputs
from rankwise.models.evaluate import sizes

WITHOUT_DATA = [method for method in METHODS if not method.needs]


def table(name: str, layer: nn.Module) -> bool:
    return isinstance(layer, nn.Embedding)


@pytest.mark.parametrize("method", WITHOUT_DATA, ids=str)
def test_they_start_exactly_train_and_fold(method: Adapter):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(20, 8, padding_idx=3), nn.Flatten(), nn.Linear(24, 4)).double()
    x, y = torch.tensor([[0, 1, 2], [7, 19, 3], [2, 2, 5]]), torch.tensor([0, 1, 2])
    before = net(x).detach()
    report = rankwise.adapt(net, method, where=table, embeddings=True)
    assert [(row["name"], row["shape"]) for row in report.rows] == [("0", [8, 20])]
    torch.testing.assert_close(net(x), before, rtol=1e-6, atol=1e-6)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    after = net(x).detach()
    rankwise.fold(net)
    assert (type(net[0]), net[0].num_embeddings, net[0].padding_idx) == (nn.Embedding, 20, 3)
    torch.testing.assert_close(net(x), after, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", WITHOUT_DATA, ids=str)
def test_the_padding_token_keeps_its_vector(method: Adapter):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(20, 8, padding_idx=3), nn.Flatten(), nn.Linear(24, 4)).double()
    with torch.no_grad():
        net[0].weight[3] = draw(8)  # nothing says that it is zero
    before = net[0].weight.detach().clone()
    rankwise.adapt(net, method, where=table, embeddings=True)
    net[2].requires_grad_(True)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.05)
    x = torch.tensor([[3, 1, 2], [7, 3, 3], [2, 2, 3]])
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(net(x), torch.tensor([0, 1, 2])).backward()
        optimizer.step()
    assert torch.equal(net[0](torch.tensor([3])), before[[3]])
    rankwise.fold(net)
    moved = (net[0].weight != before).any(1)
    assert not bool(moved[3])
    assert bool(moved[[1, 2, 7]].all())


def test_lora_of_a_table_by_its_formula():
    net, x = nn.Sequential(nn.Embedding(20, 8)).double(), torch.tensor([[4, 0], [19, 4]])
    weight = net[0].weight.detach().clone()
    rankwise.adapt(net, adapters.Lora(rank=2, alpha=3.0, start=NormalOutputs()), where=table, embeddings=True)
    left, right = (p for p in net.parameters() if p.requires_grad)
    assert left.shape == (8, 2)
    assert bool(left.any())
    assert not bool(right.any())
    right.data = draw(2, 20)
    torch.testing.assert_close(net(x), weight[x] + 1.5 * right.mT[x] @ left.mT.double())
    net(x).sum().backward()
    assert right.grad is not None
    assert right.grad.any(0).nonzero()[:, 0].tolist() == [0, 4, 19]  # tokens that were not seen get none


def test_half_precision_stays_half_precision():
    net, x = nn.Sequential(nn.Embedding(20, 8)).bfloat16(), torch.tensor([1, 2])
    before = net(x)
    rankwise.adapt(net, adapters.Lora(rank=2), where=table, embeddings=True)
    assert net(x).dtype == torch.bfloat16
    assert torch.equal(net(x), before)
    assert all(p.dtype == torch.float32 for p in net.parameters() if p.requires_grad)


def test_language_models():
    model, x = gpt2().eval(), ids()
    before = model(x).logits.detach()
    with pytest.raises(ValueError, match="no layer was selected"):  # the head has the same weight
        rankwise.adapt(model, adapters.Lora(rank=2), where=lambda name, _: name.endswith("wte"), embeddings=True)
    report = rankwise.adapt(model, adapters.Lora(rank=2), where=table, embeddings=True)
    assert [row["name"] for row in report.rows] == ["transformer.wpe"]
    torch.testing.assert_close(model(x).logits, before)
    untied = llama(tie_word_embeddings=False)
    before = untied(x).logits.detach()
    report = rankwise.adapt(
        untied, adapters.Lora(rank=2), where=lambda name, _: "embed" in name or "q_proj" in name, embeddings=True
    )
    assert [row["name"].split(".")[-1] for row in report.rows] == ["embed_tokens", "q_proj", "q_proj"]
    torch.testing.assert_close(untied(x).logits, before)
    with pytest.raises(ValueError, match="embed_tokens has an adapter already"):
        rankwise.adapt(untied, adapters.Lora(rank=2), where=lambda name, _: "embed" in name, embeddings=True)
    statistics = rankwise.calibrate(untied, [InputGram], data=[x], compressed=True)
    assert not any("embed" in name for name in statistics.layers)
    macs = sizes(untied)["macs_per_token"]
    added = sum(2 * (row["shape"][0] + row["shape"][1]) + row["shape"][0] for row in report.rows[1:])
    assert macs == sizes(llama(tie_word_embeddings=False))["macs_per_token"] + added


def test_they_are_only_adapted_where_they_are_named_and_without_data():
    model = llama(tie_word_embeddings=False)
    assert not any("embed" in row["name"] for row in rankwise.adapt(model, adapters.Lora(rank=2)).rows)
    with pytest.raises(ValueError, match=r"embeddings have none of.*embed_tokens"):
        rankwise.adapt(
            llama(tie_word_embeddings=False),
            adapters.Eva(rank=2),
            where=lambda name, _: True,
            embeddings=True,
            data=[ids()],
        )
    compressed = rankwise.compress(model, rankwise.compressors.PlainSvd(), keep=0.9, where=lambda name, _: True)
    assert not any("embed" in row["name"] for row in compressed.rows)
