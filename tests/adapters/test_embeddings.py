"""Adapters on embeddings: looked up, never multiplied by rows with a one."""

from typing import Any

import pytest
import torch
from adapters.methods import METHODS, kind, train
from contracts.examples import draw
from tiny import gpt2, ids, llama
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import rankwise
from rankwise import adapters
from rankwise.core.methods import Adapter
from rankwise.core.statistics import InputGram
from rankwise.initialisers import NormalOutputs
from rankwise.matrices import Reflections, Seeded, Spectral
from rankwise.models.evaluate import sizes

WITHOUT_DATA = [method for method in METHODS if not method.needs]


def table(name: str, layer: nn.Module) -> bool:
    return isinstance(layer, nn.Embedding)


@pytest.mark.parametrize("method", WITHOUT_DATA, ids=kind)
def test_they_start_exactly_train_and_fold(method: Adapter):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(20, 8, padding_idx=3), nn.Flatten(), nn.Linear(24, 4)).double().eval()
    x, y = torch.tensor([[0, 1, 2], [7, 19, 3], [2, 2, 5]]), torch.tensor([0, 1, 2])
    before = net(x).detach()
    report = rankwise.adapt(net, method, where=table, embeddings=True)
    assert [(row["name"], row["shape"]) for row in report.rows] == [("0", [8, 20])]
    torch.testing.assert_close(net(x), before, rtol=1e-6, atol=1e-6)
    losses = train(net.train(), lambda: functional.cross_entropy(net(x), y), lr=0.01, steps=5)
    assert losses[-1] < losses[0]
    after = net.eval()(x).detach()
    rankwise.fold(net)
    assert (type(net[0]), net[0].num_embeddings, net[0].padding_idx) == (nn.Embedding, 20, 3)
    torch.testing.assert_close(net(x), after, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", WITHOUT_DATA, ids=kind)
def test_the_padding_token_keeps_its_vector(method: Adapter):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(20, 8, padding_idx=3), nn.Flatten(), nn.Linear(24, 4)).double().eval()
    with torch.no_grad():
        net[0].weight[3] = draw(8)  # nothing says that it is zero
    before = net[0].weight.detach().clone()
    rankwise.adapt(net, method, where=table, embeddings=True)
    net[2].requires_grad_(True)
    x, y = torch.tensor([[3, 1, 2], [7, 3, 3], [2, 2, 3]]), torch.tensor([0, 1, 2])
    train(net.train(), lambda: functional.cross_entropy(net(x), y), lr=0.05, steps=3)
    net.eval()
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


@pytest.mark.parametrize("method", WITHOUT_DATA, ids=kind)
def test_half_precision_stays_half_precision(method: Adapter):
    net, x = nn.Sequential(nn.Embedding(20, 8, padding_idx=3)).bfloat16().eval(), torch.tensor([1, 2, 3])
    before = net(x)
    rankwise.adapt(net, method, where=table, embeddings=True)
    assert net(x).dtype == torch.bfloat16
    assert torch.equal(net(x), before)
    assert all(p.dtype == torch.float32 for p in net.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", WITHOUT_DATA, ids=kind)
def test_nothing_as_large_as_the_table_is_kept_for_the_gradient(method: Adapter):
    net, x = nn.Sequential(nn.Embedding(64, 64)).eval(), torch.tensor([7, 1])
    rankwise.adapt(net, method, where=table, embeddings=True)
    stored = [*net.parameters(), *net.buffers(), *(m.values for m in net.modules() if isinstance(m, Seeded))]
    known, kept = {tensor.untyped_storage().data_ptr() for tensor in stored}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        net(x)
    assert sum(t.numel() for t in kept if t.untyped_storage().data_ptr() not in known) < 64 * 64 / 2


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and not func.is_view:
            self.numel = max(self.numel, made.numel())
        return made


@pytest.mark.parametrize("method", WITHOUT_DATA, ids=kind)
def test_nothing_as_large_as_the_table_is_made(method: Adapter):
    if isinstance(method, adapters.Bat | adapters.Snella):
        pytest.skip("its matrix is written out for every product, as its docstring says")
    net, x = nn.Sequential(nn.Embedding(400, 16)).eval(), torch.tensor([7, 1])
    rankwise.adapt(net, method, where=table, embeddings=True)
    with torch.no_grad(), Largest() as largest:
        net(x)
    assert largest.numel <= 4 * 400


def test_reflections_of_a_table_by_their_formula():
    net, x = nn.Sequential(nn.Embedding(20, 8)), torch.tensor([[4, 0], [19, 4]])
    weight = net[0].weight.detach().clone()
    rankwise.adapt(net, adapters.Householder(rank=4), where=table, embeddings=True)
    (vectors,) = (p for p in net.parameters() if p.requires_grad)
    vectors.data = draw(4, 20, dtype=torch.float32)
    turned = Reflections(vectors.data).dense()
    torch.testing.assert_close(net(x), (weight.mT @ turned).mT[x])
    net.bfloat16()
    vectors.data = vectors.data.float()  # as where a model in half precision is adapted
    exact = (weight.bfloat16().float().mT @ Reflections(vectors.data).dense()).mT[x]
    torch.testing.assert_close(net(x), exact.bfloat16(), rtol=0.02, atol=0.02)


def test_gradients_of_vectors_leave_the_value_out_here_too():
    """As in the product with rows that are zero but for a one."""
    u, s, vt = torch.linalg.svd(draw(9, 6), full_matrices=False)
    matrix, index = Spectral(u, s, vt, torch.tensor([4, 1])), torch.tensor([[0, 5], [2, 5]])
    upstream = draw(2, 2, 9, seed=1)
    for training in (True, False):
        matrix.train(training)
        found, wanted = (
            torch.autograd.grad(y, list(matrix.parameters()), upstream)
            for y in (matrix.lookup(index), matrix(functional.one_hot(index, 6).double()))
        )
        torch.testing.assert_close(found, wanted)


def test_what_trains_by_a_schedule_refuses_to_train_without():
    net, x = nn.Sequential(nn.Embedding(20, 8)), torch.tensor([1, 2])
    rankwise.adapt(net, adapters.Sst(rank=2), where=table, embeddings=True)
    with pytest.raises(RuntimeError, match="nothing follows"):
        net(x)
    assert net.eval()(x).shape == (2, 8)


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
