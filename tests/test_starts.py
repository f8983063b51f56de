"""Training from scratch on structured matrices."""

import math

import pytest
import tiny
import torch
from contracts.examples import draw
from torch import Generator, nn

import rankwise
from rankwise.core.surgery import structured
from rankwise.linalg import draw_places
from rankwise.matrices import IndexedSparse, LowRank
from rankwise.starts import SparsePlusLowRankStart


def parts(matrix) -> tuple[LowRank, float, IndexedSparse]:
    scaled, sparse = matrix.matrix.parts
    return scaled.matrix, scaled.scale, sparse


def test_the_start_is_sltrains():
    m, n, density = 300, 200, 0.05
    matrix = SparsePlusLowRankStart(rank=16, density=density, alpha=8).matrix(m, n, Generator().manual_seed(0))
    low_rank, scale, sparse = parts(matrix)
    assert scale == 8 / 16
    assert not bool(low_rank.left.any())
    assert torch.equal(matrix.dense(), sparse.dense())
    sparse.check()
    kept, bound = sparse.values.numel(), n**-0.5
    assert kept == int(density * m * n)
    for drawn in (sparse.values.detach(), low_rank.right.detach()):
        assert float(drawn.abs().max()) <= bound
        assert float(drawn.square().mean()) == pytest.approx(bound**2 / 3, rel=0.1)
    empty = float((sparse.counts == 0).float().mean())
    assert empty == pytest.approx((1 - density) ** n, abs=0.01)
    spread = float(sparse.counts.float().var())  # of a hypergeometric count
    assert spread == pytest.approx(n * density * (1 - density), rel=0.3)


def test_the_seed_decides_and_the_global_generator_does_not():
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(states))
        before = torch.get_rng_state()
        model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 40))
        torch.set_rng_state(before)
        rankwise.initialise(model, SparsePlusLowRankStart(rank=3), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        states.append({k: v for k, v in model.state_dict().items() if "matrix" in k})
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(
        states[0]["0.matrix.matrix.members.1.columns"], states[2]["0.matrix.matrix.members.1.columns"]
    )


def test_a_language_model_trains():
    model = tiny.llama().train()
    report = rankwise.initialise(model, SparsePlusLowRankStart(rank=4, density=0.1))
    layers = structured(model)
    assert len(layers) == len(report.rows) == 14
    assert report.totals["keep"]["params"] < 1
    ids = torch.randint(64, (8, 16), generator=Generator().manual_seed(0))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    for layer in layers.values():
        low_rank, _, sparse = parts(layer.matrix)
        assert bool(low_rank.left.any())
        sparse.check()
        assert torch.linalg.matrix_rank(layer.matrix.dense()) > low_rank.rank  # the tail is the sparse term's


def test_a_model_that_trained_is_saved_and_loaded(tmp_path):
    model = tiny.llama()
    rankwise.initialise(model, SparsePlusLowRankStart(rank=4))
    ids = torch.arange(12)[None]
    again, _ = rankwise.load(rankwise.save(model, tmp_path / "model"))
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(("count", "kept"), [(10, 1), (10, 10), (10, 6), (1000, 300), (10**12, 50)])
def test_places_are_distinct_and_even(count: int, kept: int):
    generator = Generator().manual_seed(0)
    draws = [draw_places(count, kept, generator) for _ in range(200)]
    assert all(len(each) == kept and bool((each.diff() > 0).all()) for each in draws)
    assert all(int(each[0]) >= 0 and int(each[-1]) < count for each in draws)
    mean = float(torch.cat(draws).double().mean()) / (count - 1)
    assert mean == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / (200 * kept)))


def test_bad_arguments():
    for fields in ({"rank": 0}, {"density": 0.0}, {"density": 1.5}, {"alpha": 0.0}, {"alpha": math.inf}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            SparsePlusLowRankStart(**fields)
    with pytest.raises(TypeError, match="starts"):
        rankwise.initialise(nn.Linear(3, 3), "sltrain")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="cannot draw"):
        draw_places(3, 4, Generator())


def low_rank_model() -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(nn.Linear(24, 24), nn.LayerNorm(24), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 5))
    rankwise.compress(model, rankwise.compressors.PlainSvd(), keep=0.5, where=lambda name, _: name in ("0", "2"))
    return model, draw(64, 24).float()


def test_only_low_rank_matrices_train():
    model, x = low_rank_model()
    report = rankwise.trainable_low_rank(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    model(x).square().sum().backward()
    optimiser.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {f"{i}.matrix.{part}" for i in (0, 2) for part in ("kept", "mix")}
    held = sum(t.numel() for state in optimiser.state.values() for t in state.values() if t.dim())
    assert held == 2 * report.totals["trainable"] == 2 * sum(row["trainable"] for row in report.rows)
    assert [row["name"] for row in report.rows] == ["0", "2"]


def test_other_terms_of_a_sum_stay_frozen():
    model, x = nn.Sequential(nn.Linear(32, 32)), draw(100, 32).float()
    method = rankwise.compressors.GptqPlusLowRank(bits=4, group=8)
    labels = lambda output, batch, generator: output.sum() * 1.0  # noqa: E731 (any loss)
    rankwise.compress(model, method, keep=0.95, of="bytes", data=[x], labels=labels)
    rankwise.trainable_low_rank(model)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names == ["0.matrix.members.1.left", "0.matrix.members.1.right"]


def test_a_model_without_low_rank_matrices_is_refused():
    with pytest.raises(ValueError, match="no low-rank matrix"):
        rankwise.trainable_low_rank(nn.Linear(3, 3))
