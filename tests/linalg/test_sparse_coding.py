"""Matching pursuit against scikit-learn's, and K-SVD on planted problems."""

import itertools

import pytest
import torch
from contracts.examples import draw
from contracts.problems import correlated
from sklearn.linear_model import orthogonal_mp_gram
from torch import Generator, Tensor

from rankwise.linalg import (
    Metric,
    fit_entries,
    k_svd,
    largest,
    largest_in_groups,
    learned_dictionary,
    matching_pursuit,
    metric_norm,
    metric_svd,
)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def planted(rows: int, atoms: int, length: int, kept: int) -> tuple[Tensor, Tensor]:
    """Sparse codes of clear sizes, and atoms."""
    places = torch.rand(rows, atoms, generator=Generator().manual_seed(3)).topk(kept).indices
    sizes = draw(rows, kept, seed=4).sign() * (1 + draw(rows, kept, seed=5).abs())
    return torch.zeros(rows, atoms, dtype=torch.float64).scatter(1, places, sizes), unit(
        draw(atoms, length, seed=6)
    )


@pytest.mark.parametrize("kept", [1, 3, 9, 15])
@pytest.mark.parametrize(("atoms", "length"), [(20, 30), (30, 20)])
def test_matching_pursuit_is_that_of_scikit_learn(atoms: int, length: int, kept: int):
    basis, rows = unit(draw(atoms, length)), draw(40, length, seed=1)
    gram, moments = basis @ basis.mT, rows @ basis.mT
    codes, mask = matching_pursuit(gram, moments, kept)
    theirs = torch.from_numpy(orthogonal_mp_gram(gram.numpy(), moments.mT.numpy(), n_nonzero_coefs=kept)).mT
    torch.testing.assert_close(codes, theirs, rtol=1e-9, atol=1e-11)
    assert bool((mask.sum(1) == kept).all())
    assert not bool(codes[~mask].any())


def test_planted_sparse_codes_are_recovered():
    codes, basis = planted(200, 60, 120, 3)
    found, mask = matching_pursuit(basis @ basis.mT, codes @ basis @ basis.mT, 3)
    torch.testing.assert_close(found, codes)
    assert torch.equal(mask, codes != 0)


def test_rows_that_are_met_stop_early():
    codes, basis = planted(50, 40, 80, 3)
    found, mask = matching_pursuit(basis @ basis.mT, codes @ basis @ basis.mT, 8)
    torch.testing.assert_close(found, codes)
    assert int(mask.sum(1).max()) == 3
    nothing, none = matching_pursuit(basis @ basis.mT, torch.zeros(2, 40, dtype=torch.float64), 4)
    assert not bool(nothing.any() | none.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("picks", [1, 4])
def test_rows_stop_early_at_atoms_that_are_combinations_of_others(dtype: torch.dtype, picks: int):
    few = unit(draw(6, 30))
    basis = unit(torch.cat([few, few, draw(20, 6, seed=2) @ few])).to(dtype)
    rows = draw(40, 30, seed=1).to(dtype)
    codes, mask = matching_pursuit(basis @ basis.mT, rows @ basis.mT, 12, picks=picks)
    assert bool(codes.isfinite().all())
    assert int(mask.sum(1).max()) <= 6  # there are no more independent ones
    left = rows - codes @ basis
    assert bool((left.norm(dim=1) <= rows.norm(dim=1)).all())
    projected = rows.double() @ torch.linalg.pinv(few) @ few
    torch.testing.assert_close((codes @ basis).double(), projected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("picks", [2, 5, 16])
def test_several_picks_give_least_squares_on_their_places(picks: int):
    basis, rows = unit(draw(24, 30)), draw(40, 30, seed=1)
    codes, mask = matching_pursuit(basis @ basis.mT, rows @ basis.mT, 11, picks=picks)
    assert bool((mask.sum(1) == 11).all())
    gradient = (rows - codes @ basis) @ basis.mT
    assert float(gradient[mask].abs().max()) < 1e-10


@pytest.mark.parametrize("picks", [2, 4, 8])
def test_several_picks_stop_only_rows_that_are_met(picks: int):
    codes, _ = planted(50, 40, 80, 6)
    codes[0] = 0
    found, mask = matching_pursuit(torch.eye(40).double(), codes, 8, picks=picks)
    torch.testing.assert_close(found, codes)
    assert int(mask.sum(1).max()) <= 8


def test_groups_are_respected():
    basis, rows = unit(draw(24, 30)), draw(40, 30, seed=1)
    for picks in (1, 3, 24):
        codes, mask = matching_pursuit(basis @ basis.mT, rows @ basis.mT, 2, group=4, picks=picks)
        assert bool((mask.view(40, 6, 4).sum(2) == 2).all())
        gradient = (rows - codes @ basis) @ basis.mT
        assert float(gradient[mask].abs().max()) < 1e-9


def test_orthogonal_atoms_need_no_pursuit():
    basis, rows = torch.linalg.qr(draw(16, 16))[0], draw(30, 16, seed=1)
    target = rows @ basis.mT
    codes, mask = matching_pursuit(basis @ basis.mT, target, 5)
    assert torch.equal(mask, largest_in_groups(target.abs(), 5, 16))
    torch.testing.assert_close(codes, target * mask)


def test_masks():
    score = draw(6, 8)
    assert int(largest(score, 11).sum()) == 11
    assert float(score[largest(score, 11)].min()) > float(score[~largest(score, 11)].max())
    with pytest.raises(ValueError, match="divide"):
        largest_in_groups(score, 2, 3)
    with pytest.raises(ValueError, match="hold what is kept"):
        largest_in_groups(score, 5, 4)


@pytest.mark.parametrize(("powers", "picks"), [(1, 1), (8, 1), (1, 4)])
def test_more_turns_are_never_worse(powers: int, picks: int):
    rows, weights = correlated(80, 16, 1), draw(80, seed=9).square()

    def error(steps: int) -> float:
        codes, mask, basis = k_svd(
            rows, atoms=12, kept=5, steps=steps, powers=powers, picks=picks, weights=weights
        )
        assert bool((mask.sum(1) == 5).all())
        assert not bool(codes[~mask].any())
        torch.testing.assert_close(basis.norm(dim=1), basis.new_ones(12))
        return float((weights[:, None] * (rows - codes @ basis).square()).sum())

    errors = [error(steps) for steps in (1, 2, 4, 8, 16)]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


def test_a_planted_dictionary_is_learnt():
    codes, basis = planted(600, 16, 24, 2)
    rows = codes @ basis
    found = k_svd(rows, atoms=16, kept=2, steps=30, powers=8)
    first = k_svd(rows, atoms=16, kept=2, steps=1, powers=8)
    left, before = (float((rows - codes @ basis).norm()) for codes, _, basis in (found, first))
    assert left < 0.4 * before
    alike = (found[2] @ basis.mT).abs().amax(0)
    assert int((alike > 0.99).sum()) >= 12


def test_atoms_that_no_row_uses_are_replaced():
    rows = torch.cat([draw(60, 1) @ draw(1, 12, seed=1), draw(4, 12, seed=2)])  # almost all on one line
    error = [
        float((rows - codes @ basis).square().sum())
        for codes, _, basis in (k_svd(rows, atoms=5, kept=1, steps=steps, powers=1) for steps in (1, 4))
    ]
    assert error[1] < 1e-20 < error[0]


def test_more_atoms_than_columns():
    rows = draw(90, 6)
    codes, mask, basis = k_svd(rows, atoms=20, kept=3, steps=6, powers=1)
    assert codes.shape == mask.shape == (90, 20)
    codes6, _, basis6 = k_svd(rows, atoms=6, kept=3, steps=6, powers=1)
    assert float((rows - codes @ basis).norm()) < float((rows - codes6 @ basis6).norm())


@pytest.mark.parametrize("shape", ["full", "diagonal", "none"])
def test_entries_are_fitted_by_least_squares(shape: str):
    target, mask = draw(9, 7), draw(9, 7, seed=1) > 0
    full = {i: draw(i, i, seed=i) @ draw(i, i, seed=i).mT + torch.eye(i) for i in (9, 7)}
    left, right = {
        "full": (full[9], full[7]),
        "diagonal": (full[9].diagonal(), full[7].diagonal()),
        "none": (None, None),
    }[shape]
    written = [
        torch.eye(i).double() if m is None else m.diag() if m.dim() == 1 else m
        for m, i in ((left, 9), (right, 7))
    ]
    moment = written[0] @ target @ written[1]
    found = fit_entries(moment, mask, left, right, torch.zeros_like(target), steps=100)
    system = torch.kron(*written)[mask.flatten()][:, mask.flatten()]
    expected = torch.zeros_like(target).masked_scatter(mask, torch.linalg.solve(system, moment[mask]))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


def moment(size: int, seed: int) -> Tensor:
    rows = correlated(300, size, seed)
    return rows.mT @ rows / len(rows)


def test_a_learned_dictionary_is_refitted_to_both_metrics():
    weight, outputs, inputs = draw(40, 12), Metric(moment(40, 1), 0.05), Metric(moment(12, 2), 1e-4)

    def error(refits: int) -> float:
        codes, mask, basis = learned_dictionary(weight, outputs, inputs, atoms=8, kept=4, steps=3, refits=refits)
        assert bool((mask.sum(1) == 4).all())
        return metric_norm(weight - codes @ basis, outputs, inputs)

    errors = [error(refits) for refits in (0, 1, 2, 5)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(errors))
    assert errors[1] < 0.9 * errors[0]


def test_all_entries_kept_is_the_best_low_rank_matrix():
    weight, outputs, inputs = draw(14, 10), Metric(), Metric(moment(10, 2), 1e-4)
    codes, mask, basis = learned_dictionary(weight, outputs, inputs, atoms=4, kept=4, steps=2)
    assert bool(mask.all())
    left_out = float(metric_svd(weight, outputs, inputs)[1][4:].square().sum())
    assert metric_norm(weight - codes @ basis, outputs, inputs) == pytest.approx(left_out, rel=1e-9)
