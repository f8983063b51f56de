"""SST from scratch: the start, what the optimiser holds, and that turns of few vectors reach what few cannot."""

import math

import pytest
import tiny
import torch
from contracts.examples import draw
from torch import Generator, nn

import rankwise
from rankwise.core.surgery import structured
from rankwise.matrices import Diagonal, LowRank, Product, Scheduled, Spectral
from rankwise.starts import SpectralStart


def spectral(matrix: nn.Module) -> Spectral:
    return next(part for part in matrix.modules() if isinstance(part, Spectral))


@pytest.mark.parametrize("sizes", [(300, 200), (200, 300), (5, 40)])
def test_the_start_is_that_of_torch(sizes: tuple[int, int]):
    (m, n), bound = sizes, sizes[1] ** -0.5
    matrix = SpectralStart(rank=16).matrix(m, n, Generator().manual_seed(0))
    inner, weight = spectral(matrix), matrix.dense().detach()
    assert float(weight.abs().max()) <= bound * (1 + 1e-4)
    assert float(weight.square().mean()) == pytest.approx(bound**2 / 3, rel=0.1)
    r, k = min(16, m, n), min(m, n)
    assert sum(p.numel() for p in matrix.parameters() if p.requires_grad) == r * (m + n) + k
    assert inner.rank == k
    for vectors in (inner.vectors()[0].mT, inner.vectors()[1]):
        torch.testing.assert_close(vectors @ vectors.mT, torch.eye(k), rtol=0, atol=1e-5)


def test_the_seed_decides():
    def state(seed: int) -> dict[str, torch.Tensor]:
        model = nn.Sequential(nn.Linear(40, 50))
        rankwise.initialise(model, SpectralStart(rank=3), seed=seed)
        return {key: tensor for key, tensor in model.state_dict().items() if "matrix" in key}

    one, same, other = state(1), state(1), state(2)
    assert all(torch.equal(tensor, same[key]) for key, tensor in one.items())
    assert not torch.equal(one["0.matrix.matrix.values"], other["0.matrix.matrix.values"])


def test_nothing_trains_unfollowed():
    model = nn.Sequential(nn.Linear(12, 8))
    rankwise.initialise(model, SpectralStart(rank=2))
    with pytest.raises(RuntimeError, match=r"rankwise\.follow"):
        model(torch.ones(1, 12))


@pytest.mark.slow
def test_a_language_model_trains_and_is_saved(tmp_path):
    model = tiny.llama().train()
    rankwise.initialise(model, SpectralStart(rank=4, hold=4, warmup=1))
    layers = structured(model)
    ids = torch.randint(64, (8, 16), generator=Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    follower, losses = rankwise.follow(model, optimizer, steps=30), []
    for _ in range(30):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    for layer in layers.values():
        m, n = layer.matrix.shape
        moments = [optimizer.state[p] for p in layer.matrix.parameters()]
        held = sum(tensor.numel() for state in moments for tensor in state.values() if tensor.dim())
        assert held == 2 * (4 * (m + n) + min(m, n))
        lengths = [vectors.norm(dim=axis) for axis, vectors in enumerate(spectral(layer.matrix).vectors())]
        assert all(bool(((each - 1).abs() < 1e-5).all()) for each in lengths)
    before = model.eval()(ids).logits.detach()
    follower.finish()
    assert not any(isinstance(part, Scheduled) for part in model.modules())
    kinds = [type(layer.matrix) for layer in structured(model).values()]
    assert kinds == [Product] * 14
    torch.testing.assert_close(model(ids).logits, before)
    again, _ = rankwise.load(rankwise.save(model, tmp_path / "model"))
    torch.testing.assert_close(again(ids).logits, before)
    assert any(isinstance(part, Diagonal) for part in again.modules())


def test_a_stopped_run_is_saved_whole(tmp_path):
    model = tiny.llama()
    rankwise.initialise(model, SpectralStart(rank=4))
    ids = torch.arange(12)[None]
    again, _ = rankwise.load(rankwise.save(model, tmp_path / "model"))
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    with pytest.raises(RuntimeError, match=r"rankwise\.follow"):
        again.train()(ids)


def fitted(matrix: nn.Module, steps: int = 300) -> float:
    """Mean squared error on a linear map of full rank."""
    target = torch.linalg.qr(draw(12, 12))[0].float()
    x = draw(64, 12, seed=1).float()
    optimizer = torch.optim.Adam([p for p in matrix.parameters() if p.requires_grad], lr=0.02)
    if any(isinstance(part, Scheduled) for part in matrix.modules()):
        rankwise.follow(matrix, optimizer, steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (matrix(x) - x @ target.mT).square().mean()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@pytest.mark.slow
def test_turns_reach_what_a_fixed_rank_cannot():
    rank = 2
    turns, held = (
        fitted(SpectralStart(rank=rank, hold=hold, warmup=1).matrix(12, 12, Generator().manual_seed(0)).train())
        for hold in (6, 10**6)
    )
    fixed = fitted(LowRank(draw(12, rank, seed=2).float() / math.sqrt(12), draw(rank, 12, seed=3).float()))
    assert turns < 0.2 * min(held, fixed)  # the same trained numbers at a time, and the control that never turns


def test_bad_arguments():
    for fields in ({"rank": 0}, {"hold": 0}, {"warmup": -1}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            SpectralStart(**fields)
