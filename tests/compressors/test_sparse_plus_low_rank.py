"""The sum of a sparse and a low-rank matrix: its fit, its storage, its sizes."""

import itertools

import pytest
import torch
from contracts.examples import draw
from contracts.problems import correlated, fill
from torch import Generator, Tensor

from rankwise.compressors import KroneckerFactoredSvd, SparsePlusLowRank
from rankwise.compressors.loss_metric import LossMetric
from rankwise.linalg import Metric, metric_norm, sparse_plus_low_rank
from rankwise.matrices import IndexedSparse, PivotedLowRank, Sparse, Sum


def moment(size: int, seed: int) -> Tensor:
    rows = correlated(300, size, seed)
    return rows.mT @ rows / len(rows)


METRICS = {
    "identity": lambda: (Metric(), Metric()),
    "full": lambda: (Metric(moment(24, 1), 0.05), Metric(moment(18, 2), 1e-2)),
    "diagonal": lambda: (Metric(moment(24, 1).diagonal()), Metric(moment(18, 2).diagonal())),
}


@pytest.fixture(params=METRICS)
def metrics(request: pytest.FixtureRequest) -> tuple[Metric, Metric]:
    return METRICS[request.param]()


def spikes(m: int, n: int, count: int) -> Tensor:
    places = torch.randperm(m * n, generator=Generator().manual_seed(0))[:count]
    return torch.zeros(m * n, dtype=torch.float64).index_fill(0, places, 10.0).view(m, n)


def test_planted_terms_are_found():
    low, sparse = 5 * draw(24, 2) @ draw(2, 18, seed=1), spikes(24, 18, 20)
    left, right, found, mask = sparse_plus_low_rank(low + sparse, Metric(), Metric(), rank=2, kept=20, steps=40)
    assert torch.equal(mask, sparse != 0)
    torch.testing.assert_close(found, sparse, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(left @ right, low, rtol=1e-2, atol=1e-2)


def test_the_low_rank_term_fits_what_the_sparse_one_leaves(metrics: tuple[Metric, Metric]):
    weight = draw(24, 18)
    left, right, sparse, mask = sparse_plus_low_rank(weight, *metrics, rank=4, kept=40)
    assert int(mask.sum()) == 40
    assert not bool(sparse[~mask].any())
    outputs, _ = metrics
    rest = weight - sparse
    projected = outputs.whiten(left)
    coefficients = torch.linalg.lstsq(projected, outputs.whiten(rest)).solution
    torch.testing.assert_close(right, coefficients)  # for its columns, the right factor is the best one


def test_more_turns_are_never_worse(metrics: tuple[Metric, Metric]):
    weight = draw(24, 18)

    def error(steps: int) -> float:
        left, right, sparse, _ = sparse_plus_low_rank(weight, *metrics, rank=4, kept=60, steps=steps)
        return metric_norm(weight - left @ right - sparse, *metrics)

    errors = [error(steps) for steps in (1, 2, 4, 16)]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


def test_impossible_sizes():
    for rank, kept in ((0, 3), (19, 3), (2, 0), (2, 24 * 18 + 1)):
        with pytest.raises(ValueError, match="cannot have rank"):
            sparse_plus_low_rank(draw(24, 18), Metric(), Metric(), rank=rank, kept=kept)


def stats(m: int, n: int):
    return fill(LossMetric.needs, correlated(400, n, 3), correlated(400, m, 5))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("part", [0.1, 0.5])
@pytest.mark.parametrize("shape", [(120, 60), (60, 120), (70, 70)])
def test_a_share_is_filled_and_never_exceeded(shape: tuple[int, int], part: float, share: float):
    choices = SparsePlusLowRank(share=share, sparse_share=part).choices(draw(*shape), stats(*shape))
    numbers = shape[0] * shape[1]
    assert 0.9 * share < float(choices.costs["params"][0]) / numbers <= share
    built = choices.build(0)
    assert isinstance(built, Sum)
    low_rank, sparse = built.parts
    assert isinstance(low_rank, PivotedLowRank)
    assert 0.9 * part * share * numbers < sparse.params <= part * share * numbers
    dense = sparse.dense().detach()
    others = [kind.from_dense(dense, dense != 0).params for kind in (Sparse, IndexedSparse)]
    assert sparse.params == min(others)


def test_few_entries_are_indexed_and_many_mapped():
    weight = draw(128, 128)
    kinds = {
        part: type(
            SparsePlusLowRank(share=0.5, sparse_share=part).choices(weight, stats(128, 128)).build(0).parts[1]
        )  # pyright: ignore[reportAttributeAccessIssue]
        for part in (0.1, 0.7)
    }
    assert kinds == {0.1: IndexedSparse, 0.7: Sparse}


def test_single_large_entries_are_worth_more_than_rank():
    weight = draw(96, 3) @ draw(3, 64, seed=1) + spikes(96, 64, 150)
    problem = stats(96, 64)
    both = SparsePlusLowRank(share=0.3, sparse_share=0.3).choices(weight, problem)
    low_rank = KroneckerFactoredSvd().choices(weight, problem)
    affordable = low_rank.costs["params"] <= both.costs["params"][0]
    assert float(both.errors[0]) < 0.2 * float(low_rank.errors[affordable].min())
