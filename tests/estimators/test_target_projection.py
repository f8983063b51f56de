"""Local gradients are those of the formula, memory does not grow with depth, and features become useful."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contracts.examples import draw
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

import rankwise
from rankwise.estimators import TargetProjection
from rankwise.estimators.recurrent import unrolled
from rankwise.estimators.target_projection import sign
from rankwise.linalg import gaussian, orthogonal, seeded

CLOSE: dict[str, float] = {"rtol": 1e-12, "atol": 1e-14}
CLASSES = 3


def labels(count: int) -> Tensor:
    return torch.arange(count) % CLASSES


def codes(block: int, units: int, layer: int = 0) -> Tensor:
    """P (units, classes) of a block, with the seed 0 and the default gain."""
    return TargetProjection().gain * gaussian(units, CLASSES, seeded(0, block, layer)).double()


def learned(model: nn.Module, estimator: TargetProjection, x: Tensor, y: Tensor, **options: Any) -> nn.Module:
    rankwise.estimate(model, estimator, **options).backward(x, y)
    return model


def grad_of(parameter: Any) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def test_dense_gradients_are_those_of_the_formula():
    torch.manual_seed(0)
    a, b, c = nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, CLASSES)
    model, x, y = nn.Sequential(a, nn.Tanh(), b, nn.Sigmoid(), c).double(), draw(9, 5), labels(9)
    learned(model, TargetProjection(), x, y)
    with torch.no_grad():
        h = (x @ a.weight.mT + a.bias).tanh()
        delta = (h - codes(0, 7).mT[y].tanh()) * (1 - h.square())
        torch.testing.assert_close(grad_of(a.weight), delta.mT @ x / 9, **CLOSE)
        torch.testing.assert_close(grad_of(a.bias), delta.sum(0) / 9, **CLOSE)
        g = (h @ b.weight.mT + b.bias).sigmoid()
        delta = (g - codes(1, 6).mT[y].sigmoid()) * g * (1 - g)
        torch.testing.assert_close(grad_of(b.weight), delta.mT @ h / 9, **CLOSE)
        delta = (g @ c.weight.mT + c.bias).softmax(-1) - functional.one_hot(y, CLASSES)
        torch.testing.assert_close(grad_of(c.weight), delta.mT @ g / 9, **CLOSE)


def test_absolute_differences_give_signs():
    torch.manual_seed(0)
    a = nn.Linear(5, 7)
    model, x, y = nn.Sequential(a, nn.Tanh(), nn.Linear(7, CLASSES)).double(), draw(9, 5), labels(9)
    learned(model, TargetProjection(error=sign, projection=orthogonal, gain=0.5), x, y)
    with torch.no_grad():
        h = (x @ a.weight.mT + a.bias).tanh()
        target = (0.5 * orthogonal(7, CLASSES, seeded(0, 0, 0)).double().mT[y]).tanh()
        delta = (h - target).sign() * (1 - h.square())
    torch.testing.assert_close(grad_of(a.weight), delta.mT @ x / 9, **CLOSE)


@pytest.mark.parametrize("cells", [1, 2, None])
def test_maps_are_compared_by_cells(cells: int | None):
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 3, padding=1)
    net = [conv, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, CLASSES)]
    model, x, y = nn.Sequential(*net).double(), draw(5, 2, 4, 4), labels(5)
    learned(model, TargetProjection(cells=cells), x, y)
    maps = functional.conv2d(x, conv.weight, conv.bias, padding=1).relu()  # (5, 4, 4, 4)
    if cells == 2:  # u counts cells of one channel after another
        seen = maps.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5)).flatten(1)
    else:
        seen = maps.mean((2, 3)) if cells else maps.movedim(1, -1).flatten(1)
    target = codes(0, seen.shape[1]).mT[y].relu()
    local = (seen - target).square().sum() / 2 / 5
    torch.testing.assert_close(grad_of(conv.weight), torch.autograd.grad(local, conv.weight)[0], **CLOSE)


def test_units_without_a_target_stay():
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double(), draw(9, 5), labels(9)
    rows = grad_of(learned(model, TargetProjection(share=0.25), x, y)[0].weight).abs().sum(1) > 0  # pyright: ignore
    assert rows.tolist() == [True] * 2 + [False] * 6


class Reader(nn.Module):
    """Ids or rows, a recurrent layer, and a readout of its last state."""

    def __init__(self, layer: nn.RNNBase, ids: int = 0) -> None:
        super().__init__()
        self.table = nn.Embedding(ids, layer.input_size) if ids else nn.Identity()
        self.rows, self.head = layer, nn.Linear(layer.hidden_size, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        out = self.rows(x if self.rows.batch_first else x.transpose(0, 1))[0]
        return self.head(out[:, -1] if self.rows.batch_first else out[-1])


@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent_gradients_are_those_of_the_formula(steps: int | None, batch_first: bool):
    torch.manual_seed(0)
    rnn = nn.RNN(3, 5, batch_first=batch_first)
    model, x, y = Reader(rnn).double(), draw(4, 6, 3), labels(4)
    learned(model, TargetProjection(steps=steps), x, y)
    with torch.no_grad():
        h, target, total = x.new_zeros(4, 5), codes(0, 5).mT[y].tanh(), torch.zeros_like(rnn.weight_hh_l0)
        for t in range(6):
            before = h
            h = (x[:, t] @ rnn.weight_ih_l0.mT + h @ rnn.weight_hh_l0.mT + rnn.bias_ih_l0 + rnn.bias_hh_l0).tanh()
            if steps is None or t >= 6 - steps:
                total += ((h - target) * (1 - h.square())).mT @ before / 4 / (steps or 6)
    torch.testing.assert_close(grad_of(rnn.weight_hh_l0), total, **CLOSE)


def test_each_step_may_have_its_label():
    torch.manual_seed(0)
    model, x = Reader(nn.GRU(3, 5, batch_first=True)).double(), draw(4, 6, 3)
    tagger, y = nn.Sequential(model.rows), torch.randint(CLASSES, (4, 6), generator=seeded(1))
    heads: list[Tensor] = []

    def loss(output: Any, given: Tensor) -> Tensor:
        heads.append(model.head(output[0]))
        return functional.cross_entropy(heads[-1].flatten(0, 1), given.flatten())

    learned(tagger, TargetProjection(), x, y, loss=loss, blocks=[model.rows], classes=CLASSES)
    found, one = grad_of(model.rows.weight_hh_l0).clone(), x.new_zeros(())
    target, hidden = codes(0, 5).mT[y].tanh(), x.new_zeros(1, 4, 5)
    for t in range(6):
        out, hidden = model.rows(x[:, t : t + 1], hidden.detach())
        one = one + (out[:, 0] - target[:, t]).square().sum() / 2 / 4 / 6
    torch.testing.assert_close(found, torch.autograd.grad(one, model.rows.weight_hh_l0)[0], **CLOSE)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM, lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k)])
def test_going_step_by_step_computes_the_same(kind: Callable[..., nn.RNNBase], layers: int):
    torch.manual_seed(0)
    layer = kind(3, 5, layers, batch_first=True, bias=layers == 1).double()
    x, heard = draw(4, 6, 3), []
    out, state = unrolled(layer, lambda *each: heard.append(each[:3]))(x)
    true, last = layer(x)
    torch.testing.assert_close(out, true, **CLOSE)
    torch.testing.assert_close(state, last, **CLOSE)
    given = tuple(s + 1 for s in last) if isinstance(last, tuple) else last + 1
    torch.testing.assert_close(unrolled(layer, lambda *_: None)(x, given)[0], layer(x, given)[0], **CLOSE)
    assert heard == [(number, step, 6) for number in range(layers) for step in range(6)]


def test_what_is_before_a_recurrent_layer_learns_from_all_its_steps():
    torch.manual_seed(0)
    model = Reader(nn.GRU(3, 5, batch_first=True), ids=8).double()
    ids, y = torch.randint(8, (4, 6), generator=seeded(2)), labels(4)
    learned(model, TargetProjection(), ids, y)
    x, total, hidden = model.table(ids), torch.zeros((), dtype=torch.float64), draw(1, 4, 5) * 0
    for t in range(6):
        out, hidden = model.rows(x[:, t : t + 1], hidden.detach())
        total = total + (out[:, 0] - codes(0, 5).mT[y].tanh()).square().sum() / 2 / 4 / 6
    (true,) = torch.autograd.grad(total, model.table.weight)  # pyright: ignore
    torch.testing.assert_close(grad_of(model.table.weight), true, **CLOSE)


def test_a_linear_block_stops_at_least_squares():
    model, x, y = (
        nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, CLASSES)).double(),
        draw(20, 4),
        labels(20),
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.linalg.lstsq(x, codes(0, 6).mT[y]).solution.mT)
    learned(model, TargetProjection(), x, y)
    assert float(grad_of(model[0].weight).abs().max()) < 1e-13
    with torch.no_grad():
        model[0].weight.add_(0.1)
    model.zero_grad()
    learned(model, TargetProjection(), x, y)
    assert float(grad_of(model[0].weight).abs().max()) > 1e-3


def peak_saved(model: nn.Module, run: Callable[[], Any]) -> int:
    """The most bytes that graphs hold at one time, without parameters."""
    own, live, most = {p.untyped_storage().data_ptr() for p in model.parameters()}, 0, 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def forget(size: int) -> None:
        nonlocal live
        live -= size

    def pack(tensor: Tensor) -> Kept:
        nonlocal live, most
        kept, size = Kept(tensor), tensor.numel() * tensor.element_size()
        if tensor.untyped_storage().data_ptr() not in own:
            live, _ = live + size, weakref.finalize(kept, forget, size)
            most = max(live, most)
        return kept

    with saved_tensors_hooks(pack, lambda kept: kept.tensor):
        run()
    assert live == 0
    return most


def deep(depth: int) -> nn.Module:
    hidden = [part for _ in range(depth) for part in (nn.Linear(16, 16), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(16, CLASSES))


def test_kept_activations_do_not_grow_with_depth():
    x, y = draw(8, 16).float(), labels(8)

    def bytes_of(depth: int) -> tuple[int, int]:
        model = deep(depth)
        handle = rankwise.estimate(model, TargetProjection())
        ours = peak_saved(model, lambda: handle.backward(x, y))
        return ours, peak_saved(model, lambda: functional.cross_entropy(model(x), y).backward())

    shallow, middle, high = (bytes_of(depth) for depth in (1, 4, 16))
    assert shallow[0] == middle[0] == high[0] > 0
    assert high[1] > 3 * middle[1] > 6 * shallow[1]


def test_kept_activations_do_not_grow_with_time():
    model, y = Reader(nn.RNN(3, 5, batch_first=True)), labels(4)
    handle = rankwise.estimate(model, TargetProjection())
    few, many = (peak_saved(model, lambda t=t: handle.backward(draw(4, t, 3).float(), y)) for t in (4, 40))
    assert many < few + 4 * 5 * 36 * 4  # the states themselves, not what is between them
    assert peak_saved(model, lambda: model(draw(4, 40, 3).float()).sum().backward()) > 4 * many


def test_gradients_can_be_stepped_and_freed_at_once():
    torch.manual_seed(0)
    model, x, y = deep(3), draw(8, 16).float(), labels(8)
    optimizer = rankwise.Optimizer([(model.parameters(), rankwise.optimizers.sgd())], lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    with rankwise.Layerwise(optimizer):
        rankwise.estimate(model, TargetProjection()).backward(x, y)
        assert all(p.grad is None for p in model.parameters())
        assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        optimizer.step()


def clusters(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two of 6 classes' clusters each in 8 of 40 directions, bent; the others are noise."""
    generator, places = seeded(seed), gaussian(12, 8, seeded(99)) * 1.6
    which = torch.randint(12, (count,), generator=generator)
    near = places[which] + 0.7 * torch.randn(count, 8, generator=generator)
    bent = torch.cat([near, near.sin(), torch.randn(count, 24, generator=generator)], 1)
    return bent, which % 6


def accuracy(estimator: TargetProjection | None, trained: bool = True) -> float:
    torch.manual_seed(0)
    parts = [nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 6)]
    model, (x, y), (tx, ty) = nn.Sequential(*parts), clusters(2000, 1), clusters(2000, 2)
    for p in list(model.parameters())[:-2]:
        p.requires_grad_(trained)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    handle = rankwise.estimate(model, estimator) if estimator else None
    for batch in torch.arange(2000).repeat(8).split(100):
        optimizer.zero_grad()
        if handle is None:
            functional.cross_entropy(model(x[batch]), y[batch]).backward()
        else:
            handle.backward(x[batch], y[batch])
        optimizer.step()
    return float((model(tx).argmax(1) == ty).double().mean())


def test_features_beat_random_ones_and_come_near_those_of_back_propagation():
    ours, random, exact = accuracy(TargetProjection()), accuracy(None, trained=False), accuracy(None)
    assert ours > random + 0.1
    assert exact - ours < 0.08
    assert exact - ours < 0.5 * (exact - random)


def test_blocks_are_found_by_structure():
    conv = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*conv, nn.Flatten(), nn.Linear(8, 8), nn.Dropout(), nn.ReLU(), nn.Linear(8, CLASSES))
    assert rankwise.estimate(model, TargetProjection()).blocks == ("2", "5")
    assert rankwise.estimate(model, TargetProjection(), blocks=[model[7]]).blocks == ("7",)
    assert rankwise.estimate(Reader(nn.GRU(3, 5)), TargetProjection()).blocks == ("rows",)


def test_compressed_layers_are_blocks_and_their_factors_have_the_gradients_of_the_formula():
    torch.manual_seed(0)
    parts = [nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, CLASSES)]
    model, x, y = nn.Sequential(*parts).double(), draw(9, 8), labels(9)
    rankwise.compress(model, rankwise.compressors.PlainSvd(), keep=0.5, where=lambda name, _: name == "0")
    handle = rankwise.estimate(model, TargetProjection())
    assert handle.blocks == ("1",)
    handle.backward(x, y)
    factors = [p for p in model[0].parameters() if p.dim() == 2]
    local = (model[:2](x) - codes(0, 12).mT[y].tanh()).square().sum() / 2 / 9
    assert len(factors) == 2
    for factor, true in zip(factors, torch.autograd.grad(local, factors), strict=True):
        torch.testing.assert_close(grad_of(factor), true, **CLOSE)
    rankwise.compress(model, rankwise.compressors.PlainSvd(), keep=0.5, where=lambda name, _: name == "2")
    assert rankwise.estimate(model, TargetProjection()).network.classes == CLASSES


def test_compressed_convolutions_have_their_channels_where_plain_ones_have():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES)).double()
    rankwise.adapt(model, rankwise.adapters.Lora(rank=2), where=lambda name, _: name == "0")
    block = rankwise.estimate(model, TargetProjection()).network.blocks[0]
    assert block.layout(model[:2](draw(5, 2, 4, 4))).shape == (5, 4, 4, 4)
    assert block.layout(torch.empty(5, 4, 2, 3)).shape == (5, 2, 3, 4)


class Custom(nn.Module):
    """A layer of a kind of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_a_model_without_blocks_is_refused_unless_only_its_last_layer_trains():
    model = nn.Sequential(Custom(), nn.Tanh(), nn.Linear(5, CLASSES))
    with pytest.raises(ValueError, match="no blocks are found"):
        rankwise.estimate(model, TargetProjection())
    assert rankwise.estimate(model, TargetProjection(), blocks=[model[1]]).blocks == ("1",)
    model[0].requires_grad_(False)
    assert rankwise.estimate(model, TargetProjection()).blocks == ()


def test_blocks_may_be_given():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x)

    torch.manual_seed(0)
    model, x, y = nn.Sequential(Residual(), nn.Linear(5, CLASSES)).double(), draw(6, 5), labels(6)
    learned(model, TargetProjection(), x, y, blocks=[model[0]])
    local = (model[0](x) - codes(0, 5).mT[y]).square().sum() / 2 / 6
    weights = [model[0].inner[i].weight for i in (0, 2)]
    for weight, true in zip(weights, torch.autograd.grad(local, weights), strict=True):
        torch.testing.assert_close(grad_of(weight), true, **CLOSE)


class Attending(nn.Module):
    """A layer of a transformer, or one around a norm whose outputs go two ways, and a head."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.first, self.norm, self.attention = nn.Linear(8, 8), nn.LayerNorm(8), attention
        encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.inner = encoder if attention else nn.Linear(8, 8)
        self.whole, self.head = nn.Identity(), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        x = self.inner(x) if self.attention else x + self.inner(x).relu()
        return self.head(self.whole(x).mean(1))


@pytest.mark.parametrize("attention", [True, False])
def test_blocks_that_share_what_is_before_them_are_refused_and_whole_branches_are_not(attention: bool):
    torch.manual_seed(0)
    model, x, y = Attending(attention).double(), draw(6 * 5, 8).view(6, 5, 8), labels(6)
    found = rankwise.estimate(model, TargetProjection())
    assert not any("out_proj" in name for name in found.blocks)  # whose hooks would never be called
    with pytest.raises(ValueError, match="whole residual branches"):
        found.backward(x, y)
    model.zero_grad()
    learned(model, TargetProjection(), x, y, blocks=[model.first, model.whole])
    assert all(p.grad is not None for p in model.parameters())


def test_other_errors_of_backward_passes_are_not_renamed():
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()

    def fail(_: Tensor) -> None:
        raise RuntimeError("from outside")

    model[0].weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="from outside"):
        learned(model, TargetProjection(), draw(4, 5), labels(4))


def test_recurrent_layers_cannot_go_layer_by_layer_and_the_error_says_so():
    model = Reader(nn.GRU(3, 5, batch_first=True)).double()
    optimizer = rankwise.Optimizer([(model.parameters(), rankwise.optimizers.sgd())], lr=0.1)
    with rankwise.Layerwise(optimizer), pytest.raises(RuntimeError, match="cannot be stepped layer by layer"):
        learned(model, TargetProjection(), draw(4, 6, 3), labels(4))


def test_a_frozen_last_layer_is_left_alone_and_one_that_is_cut_off_is_noticed():
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.hidden = nn.Linear(8, CLASSES), nn.Linear(5, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.hidden(x).tanh())

    model, x, y = Backwards(), draw(6, 5).float(), labels(6)
    with pytest.raises(ValueError, match="give blocks="):
        rankwise.estimate(model, TargetProjection(), classes=CLASSES).backward(x, y)
    model.zero_grad()
    learned(model, TargetProjection(), x, y, blocks=[model.hidden], classes=CLASSES)
    assert all(p.grad is not None for p in model.parameters())
    frozen = deep(2)
    frozen[-1].requires_grad_(False)  # pyright: ignore
    learned(frozen, TargetProjection(), draw(6, 16).float(), y)
    assert [p.grad is not None for p in frozen.parameters()] == [True] * 4 + [False] * 2


def test_targets_lie_in_the_range_of_the_activation():
    seen: dict[type[nn.Module], Tensor] = {}
    for kind in (nn.ReLU, nn.Sigmoid, nn.Tanh):

        def keep(values: Tensor, targets: Tensor, kind: type[nn.Module] = kind) -> Tensor:
            seen[kind] = targets
            return values - targets

        model = nn.Sequential(nn.Linear(5, 40), kind(), nn.Linear(40, CLASSES)).double()
        learned(model, TargetProjection(error=keep, gain=3.0), draw(6, 5), labels(6))
    assert float(seen[nn.ReLU].min()) == 0
    assert 0 < float(seen[nn.Sigmoid].min()) < float(seen[nn.Sigmoid].max()) < 1
    assert -1 < float(seen[nn.Tanh].min()) < 0 < float(seen[nn.Tanh].max()) < 1


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"gain": 0.0}, "gain"),
        ({"gain": float("inf")}, "gain"),
        ({"cells": 0}, "cells"),
        ({"cells": 1.5}, "cells"),
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"share": 0.0}, "share"),
        ({"share": 1.5}, "share"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], named: str):
    with pytest.raises(ValueError, match=named):
        TargetProjection(**fields)


def test_bad_labels_models_and_blocks_are_refused():
    model, x = deep(1), draw(4, 16).float()
    handle = rankwise.estimate(model, TargetProjection())
    with pytest.raises(ValueError, match=r"labels must lie in 0 \.\.\. 2, got -100"):
        handle.backward(x, torch.tensor([0, 1, 2, -100]))
    with pytest.raises(ValueError, match="need labels for a batch of 4"):
        handle.backward(x, torch.zeros(4, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="no part of the model"):
        rankwise.estimate(model, TargetProjection(), blocks=[nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="give classes="):
        rankwise.estimate(nn.Sequential(nn.Linear(16, 3), nn.GRU(3, 2)), TargetProjection()).backward(
            x, labels(4)
        )
    reader = rankwise.estimate(Reader(nn.GRU(3, 5, batch_first=True)), TargetProjection())
    with pytest.raises(ValueError, match="sequences of 6 steps"):
        reader.backward(draw(4, 6, 3).float(), torch.zeros(4, 5, dtype=torch.long))
    both = rankwise.estimate(Reader(nn.GRU(3, 5, batch_first=True, bidirectional=True)), TargetProjection())
    with pytest.raises(ValueError, match="two directions"):
        both.backward(draw(4, 6, 3).float(), labels(4))
    with pytest.raises(ValueError, match="nothing to estimate"):
        rankwise.estimate(deep(1).requires_grad_(False), TargetProjection())
