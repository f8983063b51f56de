"""Bases of few bits, and fits that become rare."""

from typing import Any

import pytest
import torch
from contracts.examples import draw
from torch import Tensor, nn

from rankwise import Optimizer
from rankwise.core.subspaces import Projector, Refresh
from rankwise.core.transforms import state_bytes
from rankwise.linalg import unpack
from rankwise.optimizers import adam, galore, q_galore, quantised
from rankwise.projectors import Backoff, Every, Packed, Svd


def fitted(projector: Projector, grad: Tensor, rank: int) -> Any:
    return projector.fit(grad, projector.init(grad, rank, torch.tensor([0])), first=True)


def test_rounding_spoils_orthonormality_and_the_correction_restores_it():
    """The rounded columns alone are the control: their squares differ from 1 by much more than rounding."""
    grad = draw(512, 700)[None].float()
    projector = Packed(projector=Svd())
    state = fitted(projector, grad, 128)
    codes = unpack(state["codes"][0], 4)[:, :512].double()
    spread = [state[name][0].double().repeat_interleave(256, 1) for name in ("scale", "offset")]
    columns = torch.addcmul(spread[1], spread[0], codes)
    exact = fitted(Svd(), grad, 128)["columns"][0].double().mT
    assert 0.05 < float((columns - exact).norm() / exact.norm()) < 0.12
    eye = torch.eye(128)
    assert float(torch.linalg.matrix_norm(columns @ columns.mT - eye, 2)) > 0.1
    basis = projector.up(eye[None], state)[0]
    assert float(torch.linalg.matrix_norm(basis.mT @ basis - eye, 2)) < 1e-4


def test_little_of_the_gradient_is_lost():
    """About the square of the rounding error, a hundredth, where the basis holds nearly all."""
    grad = (draw(256, 32) * 0.9 ** torch.arange(32)) @ draw(32, 300, seed=1) + 0.01 * draw(256, 300, seed=2)
    exact, packed = Svd(), Packed(projector=Svd())
    held = [each.down(grad[None], fitted(each, grad[None], 32)).square().sum() for each in (exact, packed)]
    assert 0.985 < float(held[1] / held[0]) < 1


@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_groups_without_a_zero_in_their_range_are_kept(offset: float):
    """A column whose entries have one sign, and one that is constant: lost where an offset must be a code."""
    columns = torch.stack(
        [1 + 0.3 * torch.rand(64, generator=torch.Generator().manual_seed(0)), torch.ones(64)], 1
    )
    grad = (columns @ draw(2, 70).float() + offset * draw(1, 70, seed=4).float())[None]
    state = fitted(Packed(projector=Svd(), group=16), grad, 2)
    held = Packed(group=16).down(grad, state).square().sum() / grad.square().sum()
    assert float(held) > 0.999


def test_columns_that_rounding_makes_equal_do_not_stop_it():
    """What rounding might do, written down at once: two equal columns."""
    for dtype in (torch.float32, torch.float64):
        grad, same = draw(64, 80)[None].to(dtype), draw(64, 1, seed=3).to(dtype)
        projector = Packed()
        blank = projector.init(grad, 2, torch.tensor([0]))
        state: Any = projector._packed({**blank, "columns": (same / same.norm()).expand(1, 64, 2)})
        rounded, _ = projector._factors(state)
        assert int(torch.linalg.matrix_rank(rounded)) == 1
        back = projector.up(projector.down(grad, state), state)
        assert float(back.norm()) < 1.01 * float(grad.norm())
        assert bool(projector.fit(grad, state, first=False)["scale"].isfinite().all())


def walk(transform: Any, steps: int = 12) -> Tensor:
    weight = nn.Parameter(draw(9, 12))
    optimizer = Optimizer([([weight], transform)], lr=0.05)
    for step in range(steps):
        weight.grad = draw(9, 12, seed=step + 1)
        optimizer.step()
    return weight.detach()


def test_without_codes_it_is_galore():
    """With whole bases and moments and a fixed period, to the last bit."""
    options: dict[str, Any] = {"rank": 3, "every": Every(4), "projector": Svd()}
    assert torch.equal(walk(q_galore(**options, inner=adam())), walk(galore(**options)))
    assert not torch.equal(walk(q_galore(rank=3, every=Every(4), inner=adam())), walk(galore(rank=3, every=4)))


def test_it_takes_what_the_formula_says():
    """A basis takes r m / 2 bytes of codes, 8 for each 256 of a column, moments one a number, 4 for 256."""
    m, n, r = 512, 1376, 128
    basis = r * m // 2 + r * 2 * 4 * m // 256 + 2 * 8  # place and side
    moments = 2 * (r * n + 4 * r * n // 256 + 16) + 8  # shapes and a counter
    refresh = 3 * 8 + 5 * 4
    assert state_bytes(q_galore(rank=r), torch.empty(m, n, device="meta")) == basis + moments + refresh + 8
    assert state_bytes(q_galore(rank=r), torch.empty(n, m, device="meta")) == basis + moments + refresh + 8


def fits(refresh: Refresh, overlaps: list[float], steps: int) -> list[int]:
    """The steps at which a parameter is fitted, if fits find these overlaps, the last one again and again."""
    state, found = refresh.init(torch.tensor([0])), []
    for step in range(1, steps + 1):
        if bool(refresh.due(torch.tensor([step]), state, lambda: torch.ones(1))) or step == 1:
            value = overlaps[min(len(found), len(overlaps)) - 1]
            refresh.fitted(state, lambda: torch.ones(1), lambda value=value: torch.tensor([value]))
            found.append(step)
    return found


def test_fits_become_rare_where_the_subspace_stays():
    """Four overlaps, then the fifth doubles the time, again and again."""
    assert fits(Backoff(10), [1.0], 500) == [1, 11, 21, 31, 41, 51, 71, 111, 191, 351]


def test_fits_stay_frequent_where_it_changes_and_come_back():
    assert fits(Backoff(10), [0.1], 200) == list(range(1, 201, 10))
    assert fits(Backoff(10, recent=1), [1.0, 1.0, 1.0, 0.0], 200) == [1, 11, 31, 71, 151, 161, 171, 181, 191]


def subspaces(kind: str, steps: int) -> list[int]:
    """At which steps a real projection is fitted, for gradients that stay in a subspace or never do."""
    refresh, weight, found = Backoff(2, recent=2), nn.Parameter(torch.zeros(16, 20).double()), []
    optimizer = Optimizer([([weight], galore(rank=4, every=refresh, projector=Svd()))], lr=0.1)
    for step in range(steps):
        left = draw(16, 4, seed=0 if kind == "stays" else step)
        weight.grad = left @ draw(4, 20, seed=step)
        optimizer.step()
        count = int(optimizer.state[weight]["subspace"]["refresh"]["fits"])
        found += [step] if count > len(found) else []
    return found


def test_overlaps_are_those_of_subspaces():
    """Not of single vectors, whose signs and order change at random here; chance is taken off."""
    stays, changes = subspaces("stays", 60), subspaces("changes", 60)
    assert len(stays) < 9
    assert len(changes) == 30


def test_parameters_take_turns():
    kind, index = Backoff(50), torch.arange(40)
    turns = kind.init(index)["next"]
    assert int(turns.min()) >= 1
    assert len(turns.unique()) > 30


def test_moments_may_be_whole():
    assert state_bytes(q_galore(rank=4, inner=adam()), torch.empty(64, 64)) > state_bytes(
        q_galore(rank=4, inner=quantised(adam(), least=1)), torch.empty(64, 64)
    )
