"""Adapters put into the matrices under them: the best of the old rank, the same numbers, and what is refused."""

from pathlib import Path

import pytest
import torch
from contracts.examples import draw
from tiny import ids, llama
from torch import Tensor, nn

import rankwise
from rankwise import CalibrationError
from rankwise.adapters import Bat, Compacter, FactorLora, Lora
from rankwise.compressors import Gptq, GptqPlusLowRank, KroneckerFactoredSvd, PlainSvd, WhitenedSvd
from rankwise.core.choices import Unit
from rankwise.core.methods import Compressor
from rankwise.core.surgery import StructuredLinear, structured
from rankwise.linalg import metric_norm, metric_svd, truncated_factors
from rankwise.matrices import LowRank, PivotedLowRank, StructuredMatrix

LOSSLESS = 1e-6  # of a change in float32


def net(method: Compressor | None = None, keep: float = 0.6, of: Unit = "params") -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 12)).double()
    rankwise.compress(made, method or PlainSvd(), keep=keep, data=rows(), labels=squared, of=of)
    return made


def rows() -> list[Tensor]:
    return [draw(60, 20, seed=3) @ draw(20, 20, seed=4)]


def squared(output: Tensor, batch: Tensor, generator: torch.Generator) -> Tensor:
    return (output * draw(*output.shape, seed=5)).sum()


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * draw(*parameter.shape, seed=i).to(parameter))
    return model


def matrices(model: nn.Module) -> dict[str, StructuredMatrix]:
    return {name: layer.matrix for name, layer in structured(model).items()}


def dense(model: nn.Module) -> dict[str, Tensor]:
    return {name: matrix.dense().detach().double() for name, matrix in matrices(model).items()}


@pytest.mark.parametrize("gauge", ["pivot", "factors"])
@pytest.mark.parametrize("method", [PlainSvd(), WhitenedSvd(), KroneckerFactoredSvd()])
def test_what_remains_is_the_best_of_the_old_rank(gauge, method):
    model = net(PlainSvd(gauge=gauge))
    before = {name: (matrix.spec(), matrix.params) for name, matrix in matrices(model).items()}
    rankwise.adapt(model, Lora(rank=3))
    wanted, bases = dense(moved(model)), {name: x.parts[0].dense() for name, x in matrices(model).items()}
    needs = method.needs or WhitenedSvd.needs
    statistics = rankwise.calibrate(model, needs, data=rows(), labels=squared, compressed=True)
    report = rankwise.absorb(model, method, data=statistics)
    assert {name: (matrix.spec(), matrix.params) for name, matrix in matrices(model).items()} == before
    for row in report.rows:
        target, rank = wanted[row["name"]], row["rank"]
        metrics = method.metrics(statistics.of(row["name"], method.needs))
        u, s = metric_svd(target, *metrics)
        best = torch.mm(*truncated_factors(target, metrics[0], u[:, :rank]))
        torch.testing.assert_close(dense(model)[row["name"]], best, rtol=1e-8, atol=1e-8)
        change = metric_norm(target - bases[row["name"]].detach(), *metrics) ** 0.5
        assert row["lost"] == pytest.approx(float(s[rank:].norm()) / change, rel=1e-8)
        assert row["error"] == pytest.approx(float(s[rank:].norm() / s.norm()), rel=1e-8)
        assert row["lost"] > 0.01
        assert row["params_before"] == row["params_after"]
    assert report.totals["lost"] == max(row["lost"] for row in report.rows)


def test_an_adapter_that_changes_nothing_changes_no_bit():
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rankwise.adapt(model, Lora(rank=3))
    assert rankwise.absorb(model).totals["lost"] == 0
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert all(p.requires_grad for matrix in matrices(model).values() for p in matrix.parameters())


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_change_within_the_spans_is_kept_whole(side: str):
    model = net()
    rankwise.adapt(model, Lora(rank=3))
    with torch.no_grad():
        for matrix in matrices(moved(model)).values():
            base, low = matrix.parts[0].matrix, matrix.parts[1].matrix
            left, right = base.factors()
            if side == "left":
                low.left.copy_(left @ draw(left.shape[1], 3))
            else:
                low.right.copy_(draw(3, len(right)) @ right)
    wanted = dense(model)
    report = rankwise.absorb(model)
    assert report.totals["lost"] < LOSSLESS
    for name, matrix in dense(model).items():
        torch.testing.assert_close(matrix, wanted[name], rtol=1e-6, atol=1e-6)


def test_changes_of_factors_are_kept_whole():
    model, x = net(), draw(5, 20, seed=9)
    numbers = sum(p.numel() for p in model.parameters())
    rankwise.adapt(model, FactorLora(rank=3))
    before, start = moved(model)(x).detach(), net()(x).detach()
    report = rankwise.absorb(model)
    assert [row["lost"] for row in report.rows] == [0.0, 0.0]
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-9, atol=1e-9)
    assert float((before - start).norm()) > 0.1
    assert sum(p.numel() for p in model.parameters()) == numbers


def test_the_metric_loses_least_in_itself():
    lost = []
    method = KroneckerFactoredSvd()
    for chosen in (PlainSvd(), method):
        model = net()
        rankwise.adapt(model, Lora(rank=3))
        wanted = dense(moved(model))
        statistics = rankwise.calibrate(model, method.needs, data=rows(), labels=squared, compressed=True)
        rankwise.absorb(model, chosen, data=statistics)
        lost.append(
            sum(
                metric_norm(matrix - wanted[name], *method.metrics(statistics.of(name, method.needs)))
                for name, matrix in dense(model).items()
            )
        )
    assert lost[1] < 0.9 * lost[0]


def test_ordinary_layers_are_ordinary_again():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 12)), torch.randn(3, 20)
    rankwise.compress(model, PlainSvd(), keep=0.6, where=lambda name, _: name == "2")
    rankwise.adapt(model, Bat(block=4), where=lambda name, _: name == "0")
    rankwise.adapt(model, FactorLora(rank=2), where=lambda name, _: name == "2")
    before = moved(model)(x)
    rankwise.absorb(model)
    assert (type(model[0]), type(model[2])) == (nn.Linear, StructuredLinear)
    torch.testing.assert_close(model(x), before)


def test_the_low_rank_term_of_a_sum_takes_the_change():
    model = net(GptqPlusLowRank(group=8, bits=2, rank_multiple=2), keep=0.7, of="bytes")
    rankwise.adapt(model, Lora(rank=3))
    wanted = dense(moved(model))
    bases = {name: matrix.parts[0].matrix for name, matrix in matrices(model).items()}
    codes = {name: base.parts[0].dense().detach() for name, base in bases.items()}
    rankwise.absorb(model)
    for name, matrix in matrices(model).items():
        assert torch.equal(matrix.parts[0].dense(), codes[name])
        rank, target = matrix.parts[1].rank, wanted[name] - codes[name]
        u, s, vt = torch.linalg.svd(target, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        torch.testing.assert_close(matrix.parts[1].dense().double(), best, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", [Lora(rank=2), FactorLora(rank=2)])
def test_a_model_is_saved_and_loaded_as_compressed_ones_are(method, tmp_path: Path):
    model = llama(initializer_range=0.3)
    rankwise.compress(model, KroneckerFactoredSvd(), keep=0.7, data=ids().flatten())
    numbers, kinds = model.num_parameters(), {name: x.spec() for name, x in matrices(model).items()}
    rankwise.adapt(model, method)
    rankwise.save(moved(model), tmp_path / "adapter", format="rankwise")
    rankwise.absorb(model, KroneckerFactoredSvd(), data=ids().flatten())
    assert (model.num_parameters(), {name: x.spec() for name, x in matrices(model).items()}) == (numbers, kinds)
    rankwise.save(model, tmp_path / "model")
    again = rankwise.load(tmp_path / "model")[0]
    with torch.no_grad():
        torch.testing.assert_close(again(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize(
    ("prepare", "arguments", "error", "message"),
    [
        (lambda model: None, {}, ValueError, "no adapter to absorb"),
        (
            lambda model: rankwise.adapt(model, Lora(rank=2)),
            {"method": Lora()},
            TypeError,
            "must measure changes",
        ),
        (
            lambda model: rankwise.adapt(model, Lora(rank=2)),
            {"method": WhitenedSvd()},
            CalibrationError,
            "reads statistics; give data",
        ),
        (
            lambda model: rankwise.adapt(model, Compacter(count=2, reduction=2), where=lambda name, _: True),
            {},
            ValueError,
            "a module behind it",
        ),
        (lambda model: moved(rankwise.adapt(model, Bat(block=4)) and model), {}, ValueError, "of no low rank"),
    ],
)
def test_bad_requests_are_refused(prepare, arguments, error, message: str):
    model = net()
    prepare(model)
    with pytest.raises(error, match=message):
        rankwise.absorb(model, **arguments)


def test_a_layer_without_a_place_leaves_the_model_as_it_is():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 12))
    rankwise.compress(model, PlainSvd(), keep=0.6, where=lambda name, _: name == "0")
    rankwise.compress(
        model, Gptq(group=8, bits=4), keep=0.5, of="bytes", data=[torch.randn(9, 32)], labels=squared,
        where=lambda name, _: name == "2",
    )  # fmt: skip
    rankwise.adapt(model, Lora(rank=2))
    before = {name: tensor.clone() for name, tensor in moved(model).state_dict().items()}
    with pytest.raises(ValueError, match=r"layer 2: its base has no low-rank part.*rankwise\.fold"):
        rankwise.absorb(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_pivoted_and_plain_factors_hold_the_same():
    for kind in (LowRank, PivotedLowRank):
        made = kind.from_factors(draw(9, 3), draw(3, 7, seed=1))
        torch.testing.assert_close(torch.mm(*made.factors()), made.dense())
        again = made.refitted(*made.factors())
        assert again.spec() == made.spec()
        torch.testing.assert_close(again.dense(), made.dense())


@pytest.mark.slow
@pytest.mark.parametrize("method", [FactorLora(rank=4), Lora(rank=4)])
def test_adapters_heal(method):
    reference = llama(initializer_range=0.3)
    model = llama(initializer_range=0.3)
    rankwise.compress(model, PlainSvd(), keep=0.6)
    rankwise.adapt(model, method)
    own = {name for name, p in model.named_parameters() if p.requires_grad}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"window": 20, "rows": 80, "steps": 12, "every": 6, "lr": 3e-3}
    report = rankwise.heal(model, reference, data=ids().flatten(), **options)
    assert report.totals["improved"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == own
    assert {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])} == own
    assert report.totals["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_what_is_under_an_adapter_is_not_healed():
    model, reference = llama(initializer_range=0.3), llama(initializer_range=0.3)
    rankwise.compress(model, PlainSvd(), keep=0.6)
    rankwise.adapt(model, FactorLora(rank=4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"window": 20, "rows": 80, "steps": 2, "every": 1, "lr": 1e-3}
    rankwise.heal(model, reference, data=ids().flatten(), also=lambda name: True, **options)
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert "model.norm.weight" in changed
    assert not any(".base." in name for name in changed)


def test_adapters_with_schedules_are_not_healed():
    model = net()
    rankwise.adapt(model, rankwise.adapters.AdaLora(rank=3, target=2))
    with pytest.raises(ValueError, match="trains by a schedule"):
        rankwise.heal(model, net(), data=rows())


def two() -> nn.Module:
    """Two adapters with names, of which the first is on both layers and the second on the last."""
    model = net()
    rankwise.adapt(model, Lora(rank=3), name="b", where=lambda name, _: name == "2")
    rankwise.adapt(moved(model), FactorLora(rank=3), name="a")
    return moved(model)


def test_of_adapters_with_names_what_is_in_use_is_absorbed():
    x = draw(5, 20, seed=9)
    for choice, layers, idle in (
        ("a", ["0", "2"], ["b"]),
        ("b", ["2"], ["a"]),
        ({"b": 0.5}, ["2"], ["a"]),
    ):
        model = two()
        rankwise.use(model, choice)
        before = model(x).detach()
        report = rankwise.absorb(model)
        assert [row["name"] for row in report.rows] == layers
        assert report.totals["idle"] == idle
        assert all(name in report.title for name in idle)
        assert {type(matrix) for matrix in matrices(model).values()} == {
            type(x) for x in matrices(net()).values()
        }
        if choice == "a":  # exactly, as without a name
            assert report.totals["lost"] == 0
            torch.testing.assert_close(model(x).detach(), before, rtol=1e-9, atol=1e-9)
    plain = net()
    rankwise.adapt(plain, Lora(rank=3), where=lambda name, _: name == "2")
    model = two()
    rankwise.use(model, "b")
    assert rankwise.absorb(model).rows == rankwise.absorb(moved(plain)).rows


def test_what_is_not_in_use_is_not_absorbed():
    model = two()
    for choice, message in ((None, "no adapter to absorb"), (["a", None], "each row has its own")):
        rankwise.use(model, choice)
        with pytest.raises(ValueError, match=message):
            rankwise.absorb(model)
        assert rankwise.adapters_of(model).keys() == {"a", "b"}


@pytest.mark.parametrize("method", [Lora(rank=2), FactorLora(rank=2), None])
def test_numbers_that_are_not_finite_are_not_absorbed(method):
    model = net() if method else nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 12))
    rankwise.adapt(model, method or Lora(rank=2))
    list(p for p in model.parameters() if p.requires_grad)[-1].data.view(-1)[0] = torch.nan
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"layer 2: .*NaN or infinity"):
        rankwise.absorb(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], t) or t.isnan().any() for name, t in before.items())


def test_numbers_that_become_too_large_are_not_absorbed():
    model = nn.Sequential(nn.Linear(20, 24)).half()
    rankwise.adapt(model, Lora(rank=2))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.fill_(1e3)
    with pytest.raises(ValueError, match=r"layer 0: .*too large for torch\.float16"):
        rankwise.absorb(model)


def test_a_followed_model_is_finished_first():
    model = net()
    rankwise.adapt(model, rankwise.adapters.AdaLora(rank=3, target=2))
    trained = [p for p in model.parameters() if p.requires_grad]
    follower = rankwise.follow(model, torch.optim.AdamW(trained), steps=5)
    with pytest.raises(ValueError, match=r"followed still; call finish\(\)"):
        rankwise.absorb(model)
    with pytest.warns(UserWarning, match="budget"):
        follower.finish()
