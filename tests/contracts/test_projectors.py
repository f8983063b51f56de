"""What every exported projector promises."""

import inspect
from typing import Any

import pytest
import torch
from contracts.examples import draw
from torch import Tensor

from rankwise import projectors
from rankwise.core.states import leaves, map_state
from rankwise.core.subspaces import Carry, Projector, Refresh

SETTINGS: dict[str, list[Projector]] = {
    "Cosine": [projectors.Cosine()],
    "LargestRows": [projectors.LargestRows()],
    "Packed": [projectors.Packed(), projectors.Packed(projector=projectors.Svd(), bits=5, group=4)],
    "RandomOrthogonal": [projectors.RandomOrthogonal()],
    "RandomRows": [projectors.RandomRows()],
    "Randomised": [projectors.Randomised(), projectors.Randomised(oversampling=0, steps=0)],
    "RowBlock": [projectors.RowBlock()],
    "Svd": [projectors.Svd()],
    "WarmPower": [projectors.WarmPower(), projectors.WarmPower(steps=3, start=5, fresh=2)],
}
NAMES = [n for n in projectors.__all__ if not issubclass(getattr(projectors, n), (Refresh, Carry))]
FIND_VECTORS = (projectors.Randomised, projectors.Svd, projectors.WarmPower)
SIDE, LENGTH, RANK = 9, 14, 4
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def test_all_projectors_are_here():
    assert sorted(SETTINGS) == sorted(NAMES)
    assert all(inspect.isclass(getattr(projectors, name)) for name in projectors.__all__)


@pytest.fixture(params=[(name, i) for name in SETTINGS for i in range(len(SETTINGS[name]))], ids=str)
def projector(request: pytest.FixtureRequest) -> Projector:
    name, i = request.param
    return SETTINGS[name][i]


def gradients(k: int = 3, side: int = SIDE, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.stack([draw(side, length, seed=seed + 7 * i) for i in range(k)])


def fitted(projector: Projector, grad: Tensor, rank: int = RANK, fits: int = 1) -> Any:
    state = projector.init(grad, rank, torch.arange(len(grad)))
    for i in range(fits):
        state = projector.fit(grad, state, first=i == 0)
    return state


@pytest.mark.parametrize("fits", [0, 1, 3])
@pytest.mark.parametrize(("side", "rank"), [(SIDE, RANK), (SIDE, 1), (SIDE, SIDE - 1), (SIDE, SIDE), (1, 1)])
def test_there_and_back(projector: Projector, side: int, rank: int, fits: int):
    grad = gradients(side=side)
    state = fitted(projector, grad, rank, fits)
    low = torch.stack([draw(rank, 5, seed=i) for i in range(3)])
    assert projector.rank(state) == rank
    up = projector.up(low, state)
    assert up.shape == (3, side, 5)
    torch.testing.assert_close(projector.down(up, state), low, **CLOSE)
    back = projector.up(projector.down(grad, state), state)
    torch.testing.assert_close((back * (grad - back)).sum((-2, -1)), torch.zeros(3).double(), rtol=0, atol=1e-9)
    if rank == side:
        torch.testing.assert_close(back, grad, **CLOSE)


def test_one_by_one_is_the_same(projector: Projector):
    grad, index = gradients(), torch.tensor([5, 0, 17])
    state = projector.fit(grad, projector.init(grad, RANK, index), first=True)
    for i in range(3):
        one = grad[i : i + 1]
        alone = projector.fit(one, projector.init(one, RANK, index[i : i + 1]), first=True)
        map_state(lambda a, b, i=i: torch.testing.assert_close(a[i : i + 1], b, **CLOSE), state, alone)


def test_arguments_are_not_written_into_and_forms_stay(projector: Projector):
    grad = gradients()
    state = projector.init(grad, RANK, torch.arange(3))
    before, kept = grad.clone(), map_state(torch.clone, state)
    for first in (True, False):
        new = projector.fit(grad, state, first=first)
        map_state(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), state, kept)
        torch.testing.assert_close(grad, before, rtol=0, atol=0)
        assert [(leaf.shape, leaf.dtype) for leaf in leaves(new)] == [
            (leaf.shape, leaf.dtype) for leaf in leaves(state)
        ]


def test_the_state_has_its_size_before_any_number(projector: Projector):
    grad = gradients().float()
    state = fitted(projector, grad)
    blank = projector.init(grad.to("meta"), RANK, torch.arange(3))
    assert list(blank) == list(state)
    for name, value in blank.items():
        assert (value.shape, value.dtype) == (state[name].shape, state[name].dtype)
        assert value.is_meta or value.dtype == torch.int64  # counters stay on the CPU


def test_rotations_are_products_of_bases(projector: Projector):
    grad = gradients()
    one, two = fitted(projector, grad), fitted(projector, gradients(seed=3), fits=2)
    eye = torch.eye(RANK, dtype=torch.float64).expand(3, RANK, RANK)
    bases = [projector.up(eye, state) for state in (one, two)]
    torch.testing.assert_close(projector.rotation(one, two, grad), bases[1].mT @ bases[0], **CLOSE)


def test_zero_gradients_have_a_basis_too(projector: Projector):
    grad = torch.zeros(2, SIDE, LENGTH, dtype=torch.float64)
    state = fitted(projector, grad, fits=2)
    low = torch.ones(2, RANK, 3, dtype=torch.float64)
    torch.testing.assert_close(projector.down(projector.up(low, state), state), low, **CLOSE)


def test_what_finds_vectors_finds_a_low_rank_gradient(projector: Projector):
    if not isinstance(projector, FIND_VECTORS):
        pytest.skip("chooses from a fixed basis")
    grad = gradients(side=SIDE)[:, :, :RANK] @ gradients(side=RANK, seed=40)
    state = fitted(projector, grad)
    torch.testing.assert_close(projector.up(projector.down(grad, state), state), grad, **CLOSE)


def test_svd_holds_the_most_and_signs_are_fixed():
    grad = gradients()
    state = fitted(projectors.Svd(), grad)
    values = torch.linalg.svdvals(grad)
    held = projectors.Svd().down(grad, state).square().sum((-2, -1))
    torch.testing.assert_close(held, values[:, :RANK].square().sum(-1), **CLOSE)
    other = fitted(projectors.Svd(), -grad)
    torch.testing.assert_close(state["columns"], other["columns"], **CLOSE)


@pytest.mark.parametrize("name", ["LargestRows", "Cosine"])
def test_chosen_rows_are_the_best_of_all_subsets(name: str):
    """Brute force over all subsets of a small basis."""
    projector = SETTINGS[name][0]
    grad = gradients(k=1, side=6, length=7)
    whole = projector.down(grad, fitted(projector, grad, rank=6))
    energies = whole.square().sum(-1)[0]
    best = max(sum(float(energies[i]) for i in each) for each in torch.combinations(torch.arange(6), 2).tolist())
    held = projector.down(grad, fitted(projector, grad, rank=2)).square().sum()
    assert float(held) == pytest.approx(best, rel=1e-10)


def test_what_finds_vectors_finds_those_that_the_first_gradients_had_not(projector: Projector):
    """Other rows and other columns, as those of units that did not fire before: no product leads there."""
    if not isinstance(projector, FIND_VECTORS):
        pytest.skip("chooses from a fixed basis")
    one, other = torch.zeros(2, 3, SIDE, LENGTH, dtype=torch.float64)
    one[:, :4, :6], other[:, 4:8, 6:] = gradients(side=4, length=6), gradients(side=4, length=8, seed=50)
    state = fitted(projector, one, rank=4, fits=2)
    for _ in range(2):
        state = projector.fit(other, state, first=False)
    torch.testing.assert_close(projector.up(projector.down(other, state), state), other, **CLOSE)


@pytest.mark.parametrize("name", ["RandomOrthogonal", "RandomRows", "RowBlock"])
def test_subspaces_move_on(name: str):
    projector, grad = SETTINGS[name][0], gradients(side=40)
    spans = [
        projector.up(torch.eye(RANK).double().expand(3, RANK, RANK), fitted(projector, grad, fits=i))
        for i in (1, 2, 3)
    ]
    for one, two in ((0, 1), (1, 2)):
        assert float((spans[one].mT @ spans[two]).norm()) < 0.9 * float(spans[one].norm())
    if name != "RowBlock":
        assert not torch.equal(spans[0][0], spans[0][1])  # parameters differ


def test_blocks_visit_all_rows_equally():
    projector, grad = projectors.RowBlock(), gradients(k=1, side=8)
    rows = [fitted(projector, grad, fits=i)["rows"] for i in (1, 2, 3, 4)]
    assert sorted(torch.cat(rows).flatten().tolist()) == sorted([*range(8), *range(8)])


def test_a_random_basis_holds_its_share_on_average():
    """E of the share that r of s directions hold is r / s, for any gradient."""
    grad = torch.zeros(1, 16, 1, dtype=torch.float64)
    grad[0, 3, 0], grad[0, 11, 0] = 1.0, -2.0
    many = grad.expand(2000, 16, 1)
    projector = projectors.RandomOrthogonal()
    state = projector.fit(many, projector.init(many, 4, torch.arange(2000)), first=True)
    shares = projector.down(many, state).square().sum((-2, -1)) / grad.square().sum()
    assert abs(float(shares.mean()) - 4 / 16) < 4 * float(shares.std()) / 2000**0.5


def drifting(steps: int, side: int = 40, length: int = 60):
    """Gradients with a falling spectrum whose directions turn slowly."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, n, generator=generator, dtype=torch.float64) for n in (side, length))
    turn = torch.randn(side, side, generator=generator, dtype=torch.float64)
    values = torch.diag(0.8 ** torch.arange(side, dtype=torch.float64))
    spin = torch.matrix_exp(0.01 * (turn - turn.mT))
    basis = torch.linalg.qr(left).Q
    for _ in range(steps):
        basis = spin @ basis
        yield (basis @ values @ torch.linalg.qr(right).Q[:side])[None]


def test_warm_starts_follow_a_drifting_gradient():
    """One step from the last basis holds what an SVD holds, and much more than one step from random vectors."""
    power, cold = projectors.WarmPower(start=1), []
    warm: Any = None
    for step, grad in enumerate(drifting(12)):
        blank = power.init(grad, 5, torch.tensor([0]))
        warm = power.fit(grad, blank if warm is None else warm, first=warm is None)
        best = projectors.Svd().down(grad, fitted(projectors.Svd(), grad, 5)).square().sum()
        held = power.down(grad, warm).square().sum()
        index = torch.tensor([step])
        cold.append(
            float(power.down(grad, power.fit(grad, power.init(grad, 5, index), first=True)).square().sum())
        )
    assert float(held) > 0.995 * float(best)
    assert sum(cold) / len(cold) < 0.995 * float(best)


def test_columns_keep_their_signs_and_order():
    """Warm bases of a nearly unchanged gradient are nearly unchanged, not only their spans."""
    grad = next(iter(drifting(1)))
    power = projectors.WarmPower()
    state = fitted(power, grad, 5, fits=30)
    moved = power.fit(grad + 1e-6 * draw(40, 60), state, first=False)
    torch.testing.assert_close(state["columns"], moved["columns"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: projectors.WarmPower(steps=0), "steps"),
        (lambda: projectors.WarmPower(start=0), "start"),
        (lambda: projectors.WarmPower(fresh=-1), "fresh"),
        (lambda: projectors.Randomised(steps=-1), "steps"),
        (lambda: projectors.Randomised(oversampling=-1), "oversampling"),
        (lambda: projectors.Packed(bits=9), "bits"),
        (lambda: projectors.Packed(group=0), "group"),
        (lambda: projectors.Backoff(0), "steps"),
        (lambda: projectors.Backoff(enough=2.0), "enough"),
        (lambda: projectors.Every(0), "steps"),
        (lambda: projectors.EnergyDrop(below=0.0), "below"),
    ],
)
def test_bad_fields_are_refused(make: Any, name: str):
    with pytest.raises(ValueError, match=name):
        make()
