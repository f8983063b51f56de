"""Layers that are compressed as one matrix: which stand together, what is known of them, and what they share."""

import copy
import dataclasses

import pytest
import torch
from contracts.examples import draw
from contracts.problems import correlated, fill
from tiny import ids, llama
from torch import Generator, Tensor, nn

import rankwise
from rankwise.compressors import CoSpaDi, KroneckerFactoredSvd, Mixed, OrthogonalDictionary
from rankwise.compressors.sparse_dictionary import Pattern, SparseDictionary
from rankwise.core.errors import CalibrationError
from rankwise.core.report import Report
from rankwise.core.statistics import InputGram, InputMean, OutputGradGram
from rankwise.core.surgery import select, structured
from rankwise.core.together import together
from rankwise.linalg import Metric, metric_norm
from rankwise.matrices import Product, Sparse, from_spec

KINDS = [CoSpaDi, OrthogonalDictionary]
PATTERNS: list[Pattern] = ["free", "2:4"]


class Block(nn.Module):
    """Two layers of other shapes, as in a transformer's block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, width), nn.Linear(width, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


def blocks(count: int = 5, width: int = 48) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Block(width) for _ in range(count)]).double()


def compressed(method: SparseDictionary, keep: float = 0.6, count: int = 5, **more) -> tuple[nn.Module, Report]:
    net = blocks(count)
    return net, rankwise.compress(net, method, keep=keep, data=[correlated(300, 32, 3)], **more)


def groups(net: nn.Module, method: SparseDictionary, *unreached: str) -> list[list[str]]:
    found = together(select(net), method, unreached).values()
    return [[site.name for site in each.sites] for each in found]


def test_layers_of_one_shape_and_kind_stand_together_in_order():
    net, method = blocks(), OrthogonalDictionary(layers=2)
    assert groups(net, method) == [
        *(["0.up", "1.up"], ["0.down", "1.down"], ["2.up", "3.up"], ["2.down", "3.down"], ["4.up"], ["4.down"])
    ]
    assert groups(net, method, "1.up", "3.down")[:3] == [["0.up", "2.up"], ["0.down", "1.down"], ["1.up"]]
    assert groups(net, OrthogonalDictionary()) == [[name] for name in select(net)]
    net[1] = Block(64).double()
    assert groups(net, OrthogonalDictionary(layers=9))[:2] == [
        ["0.up", "2.up", "3.up", "4.up"],
        ["0.down", *(f"{i}.down" for i in (2, 3, 4))],
    ]


def test_layers_whose_places_would_not_fill_whole_numbers_stay_alone():
    net = blocks(width=49)  # 49 rows; 49 columns beside each other
    assert groups(net, OrthogonalDictionary(layers=2)) == [[name] for name in select(net)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_atoms_are_one_matrix_and_are_counted_once(kind: type[SparseDictionary], pattern: Pattern):
    net, report = compressed(kind(layers=2, pattern=pattern))
    layers = structured(net)
    for path in ("up", "down"):
        beside = path == "down" and pattern == "free"
        atoms = [layers[f"{i}.{path}"].matrix.parts[0 if beside else 1] for i in range(5)]  # pyright: ignore
        assert [atoms[i] is atoms[0] for i in range(5)] == [True, True, False, False, False]
        assert atoms[2] is atoms[3]
        assert atoms[3] is not atoms[4]
    stored = {t.data_ptr(): t for layer in layers.values() for t in layer.matrix.state_dict().values()}
    dense = sum(48 * 32 for _ in layers)
    assert report.totals["keep"]["bytes"] == sum(t.nbytes for t in stored.values()) / (8 * dense)
    assert sum(row["params_after"] for row in report.rows) == report.totals["keep"]["params"] * dense
    macs = sum(layer.matrix.macs for layer in layers.values())
    assert report.totals["keep"]["macs"] == macs / dense
    assert report.totals["keep"]["params"] <= 0.6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("path", ["up", "down"])
def test_costs_and_errors_are_those_of_the_layers(kind: type[SparseDictionary], pattern: Pattern, path: str):
    net, method = blocks(3), kind(layers=3, pattern=pattern)
    stats = rankwise.calibrate(net, method.needs, data=[correlated(300, 32, 3)])
    group = together(select(net), method)[f"0.{path}"]
    assert len(group.sites) == 3
    pooled = group.statistics(lambda name: stats.of(name, method.needs), method.needs)
    choices = method.choices(group.weight, pooled)
    for i, error in enumerate(choices.errors.tolist()):
        matrix = choices.build(i)
        parts = method.apart(matrix)
        torch.testing.assert_close(torch.cat([part.dense() for part in parts], group.axis), matrix.dense())
        stored = {t.data_ptr(): t for part in parts for t in part.state_dict().values()}.values()
        assert int(choices.costs["bytes"][i]) == sum(t.nbytes for t in stored)
        assert int(choices.costs["params"][i]) == matrix.params
        assert int(choices.costs["macs"][i]) == sum(part.macs for part in parts)
        changes = group.parts(group.weight - matrix.dense().detach())
        assert sum(choices.error_of(change) for change in changes) == pytest.approx(error, rel=1e-6)


def test_what_layers_have_in_common_is_pooled_and_the_rest_is_their_own():
    rows = [(correlated(50 + 10 * i, 4, i).float(), correlated(50 + 10 * i, 3, i + 9).float()) for i in range(3)]
    inputs, outputs = [], []
    for x, grad in rows:
        inputs.append(InputGram(3, 4))
        inputs[-1].update(x)
        outputs.append(OutputGradGram(3, 4))
        outputs[-1].update(None, grad)
    every = torch.cat([x for x, _ in rows]).double()
    whole = InputGram.pooled(inputs)
    pooled = whole.value()
    assert whole.size == pytest.approx(float(every.square().sum()) / len(every), rel=1e-5)
    torch.testing.assert_close(pooled, every.mT @ every / len(every), rtol=1e-5, atol=1e-6)
    own = OutputGradGram.blocks(outputs, [1.0, 2.0, 0.5]).value()
    blocks = [each.value() * scale for each, scale in zip(outputs, (1.0, 2.0, 0.5), strict=True)]
    torch.testing.assert_close(own, torch.block_diag(*blocks), rtol=1e-6, atol=1e-7)
    with pytest.raises(CalibrationError, match="InputMean"):
        InputMean.pooled([InputMean(3, 4)])


@pytest.mark.parametrize("kind", KINDS)
def test_sharing_pays_where_layers_have_atoms_in_common(kind: type[SparseDictionary]):
    """Rows of three layers are sparse in the same atoms: at the same size the error is less than half."""
    atoms = torch.linalg.qr(draw(24, 24))[0][:16]
    places = torch.rand(3, 96, 16, generator=Generator().manual_seed(2)) < 0.3
    weights = draw(3 * 96, 16, seed=1).view(3, 96, 16) * places @ atoms
    inputs, gradients = draw(4000, 24, seed=3), draw(4000, 3 * 96, seed=4)
    method = kind(share=0.5, steps=20)
    alone = [method.choices(each, fill(method.needs, inputs, gradients[:, :96])) for each in weights]
    shared = dataclasses.replace(method, layers=3)
    both = shared.choices(weights.flatten(0, 1), fill(method.needs, inputs, gradients))
    assert int(both.costs["params"][0]) <= 0.5 * weights.numel()
    assert float(both.errors[0]) < 0.5 * sum(float(each.errors[0]) for each in alone)


def test_the_damage_of_each_layer_is_measured_in_the_metric_of_all():
    net, method = blocks(2), OrthogonalDictionary(layers=2)
    stats = rankwise.calibrate(net, method.needs, data=[correlated(300, 32, 3)])
    dense = {name: site.weight for name, site in select(net).items()}
    report = rankwise.compress(net, method, keep=0.5, data=stats)
    layers = structured(net)
    grams = [[stats.layers[f"{i}.up"][need].value() for need in method.needs] for i in (0, 1)]
    inputs = sum(gram for gram, _ in grams) / 2
    shares = [gram.trace() / inputs.trace() for gram, _ in grams]
    grams = [(gram, share * grad) for (gram, grad), share in zip(grams, shares, strict=True)]
    inputs = inputs.lerp(inputs.diagonal().diag(), method.input_shrinkage)
    whole = torch.block_diag(*[gram for _, gram in grams])
    outputs = [gram + method.output_damping * whole.diagonal().mean() * torch.eye(48) for _, gram in grams]
    for i in (0, 1):
        (row,) = [row for row in report.rows if row["name"] == f"{i}.up"]
        change = dense[f"{i}.up"] - layers[f"{i}.up"].matrix.dense().detach()
        wanted = 0.5 * metric_norm(change, Metric(outputs[i]), Metric(inputs, method.input_damping))
        assert row["measured_error"] == pytest.approx(wanted, rel=1e-6)
    measured = sum(row["measured_error"] for row in report.rows)
    assert measured == pytest.approx(sum(row["predicted_error"] for row in report.rows), rel=1e-6)


def test_damage_is_measured_in_the_same_units_whatever_is_common():
    """Inputs 100 times as large, gradients as small: what is said is within 4 times the layer's own damage."""
    net, method = blocks(2), OrthogonalDictionary(layers=2)
    stats = rankwise.calibrate(net, method.needs, data=[correlated(300, 32, 3)])
    for name in ("1.up", "1.down"):
        own = copy.deepcopy(stats.layers[name])
        own[InputGram].sum *= 1e4
        own[OutputGradGram].sum *= 1e-4
        stats = dataclasses.replace(stats, layers={**stats.layers, name: own})
    dense = {name: site.weight for name, site in select(net).items()}
    report = rankwise.compress(net, method, keep=0.5, data=stats)
    for row in report.rows:
        change = dense[row["name"]] - structured(net)[row["name"]].matrix.dense().detach()
        alone = KroneckerFactoredSvd().error_of(stats.of(row["name"], method.needs))(change)
        assert 0.25 < row["measured_error"] / alone < 4


def test_a_layer_of_which_nothing_is_kept_is_saved_and_loaded():
    spec = Sparse.from_dense(torch.zeros(4, 6)).spec()
    again = from_spec(spec)
    assert spec["kept"] == 0
    assert torch.equal(again.dense(), torch.zeros(4, 6))
    again.check()


@pytest.mark.slow
def test_atoms_are_healed_once(tmp_path):
    torch.manual_seed(0)
    model, before = llama(), llama()
    rankwise.compress(model, OrthogonalDictionary(layers=2), keep=0.6, data=ids())
    distinct = {id(p): p.numel() for layer in structured(model).values() for p in layer.matrix.parameters()}
    report = rankwise.heal(model, before, data=ids(), budget=60.0, steps=2, checkpoint=tmp_path)
    assert report.totals["trained"] == sum(distinct.values())


def test_an_adapter_does_not_go_into_atoms_that_layers_share():
    model = llama()
    rankwise.compress(model, OrthogonalDictionary(layers=2), keep=0.6, data=ids())
    rankwise.adapt(model, rankwise.adapters.FactorLora(rank=2))
    with pytest.raises(ValueError, match=r"layers .*layers\.0.* and .*layers\.1.* share a part"):
        rankwise.absorb(model, data=ids())


def test_plain_transformers_saves_what_had_an_adapter(tmp_path):
    model = llama()
    rankwise.compress(model, OrthogonalDictionary(layers=2), keep=0.6, data=ids())
    rankwise.adapt(model, rankwise.adapters.Lora(rank=2), name="one")
    rankwise.use(model, None)
    rankwise.remove_adapter(model, "one")
    model.save_pretrained(tmp_path)


def test_errors_name_all_layers_of_a_group():
    net, method = blocks(2), OrthogonalDictionary(layers=2)
    stats = rankwise.calibrate(net, method.needs, data=[correlated(300, 32, 3)])
    stats.layers["1.up"][OutputGradGram].sum.fill_(torch.nan)
    with pytest.raises(CalibrationError, match=r"layer 0.up, 1.up: "):
        rankwise.compress(net, method, keep=0.5, data=stats)


@pytest.mark.parametrize("of", ["bytes", "macs", "params"])
def test_every_budget_is_kept(of):
    _, report = compressed(OrthogonalDictionary(layers=3), 0.55, of=of)
    assert 0.3 < report.totals["keep"][of] <= 0.55


def test_both_layers_train_what_they_share():
    net, _ = compressed(OrthogonalDictionary(layers=2), count=2)
    layers = structured(net)
    matrix = layers["0.up"].matrix
    assert isinstance(matrix, Product)
    atoms = next(matrix.parts[1].parameters())
    layers["0.up"].matrix.dense().sum().backward()
    assert atoms.grad is not None
    alone = atoms.grad.clone()
    layers["1.up"].matrix.dense().sum().backward()
    assert not torch.equal(atoms.grad, alone)


def test_what_cannot_share_says_so(tmp_path):
    method = OrthogonalDictionary(layers=2)
    with pytest.raises(ValueError, match="layers=1"):
        compressed(method, sequential=True)
    with pytest.raises(ValueError, match="layers=1"):
        rankwise.compress_folder(
            tmp_path / "none", tmp_path / "out", method, keep=0.5, data=torch.zeros(1, 8).long()
        )
    with pytest.raises(ValueError, match="layers=1"):
        compressed(method, of="latency")
    with pytest.raises(ValueError, match="layers=1"):
        Mixed(methods=(KroneckerFactoredSvd(), method))
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match="layers"):
            dataclasses.replace(method, layers=wrong)
