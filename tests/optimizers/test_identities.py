"""Optimisers that are special cases of each other, of torch's, or of a formula, take the same steps."""

from typing import Any

import pytest
import torch
from optimizers.walks import CLOSE, assert_same, draw, gradient, inside, ours, plain_adam, walk

from rankwise.core.transforms import state_bytes
from rankwise.linalg import MUON, POLAR_EXPRESS, newton_schulz
from rankwise.optimizers import (
    adafactor,
    adam,
    adamp,
    apollo,
    apollo_mini,
    aro,
    auon,
    dct_adamw,
    fira,
    frugal,
    galore,
    hybrid_auon,
    ldadam,
    muon,
    sgd,
    sgdp,
    sign,
    soap,
    trion,
)
from rankwise.optimizers.adam import Adam
from rankwise.projectors import Every, LargestRows, RowBlock, Svd


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_is_that_of_torch(decay: float):
    options = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3}
    theirs = walk(lambda params: torch.optim.AdamW(params, weight_decay=decay, **options))  # type: ignore[arg-type]
    assert_same(walk(ours(adam(betas=(0.8, 0.95), eps=1e-3), weight_decay=decay)), theirs)


def test_eps_may_be_added_before_the_bias_is_taken_out():
    """The step of the published code of GaLore: lr sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)."""
    weight, mean, square = draw(6, 9, seed=0), torch.zeros(()).double(), torch.zeros(()).double()
    for step in range(8):
        grad, t = gradient((6, 9), 0, step), step + 1
        mean, square = 0.9 * mean + 0.1 * grad, 0.999 * square + 0.001 * grad.square()
        weight = weight - 0.05 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * mean / (square.sqrt() + 1e-2)
    (found,) = walk(ours(adam(eps=1e-2, early_eps=True)), [(6, 9)], 8)
    torch.testing.assert_close(found, weight, **CLOSE)
    assert not torch.allclose(found, walk(ours(adam(eps=1e-2)), [(6, 9)], 8)[0], atol=1e-3)


@pytest.mark.parametrize(("beta", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_is_that_of_torch(beta: float, nesterov: bool):
    theirs = walk(lambda params: torch.optim.SGD(params, lr=0.05, momentum=beta, nesterov=nesterov))
    assert_same(walk(ours(sgd(beta=beta, nesterov=nesterov))), theirs)


def test_adam_in_the_whole_space_is_adam():
    """The identity as a projection, fitted again and again."""
    shapes = [(6, 9), (9, 6)]
    assert_same(walk(ours(inside(RowBlock(), adam(), 6)), shapes), walk(ours(adam()), shapes))


def test_momentum_in_any_whole_space_is_momentum():
    """A basis of the whole space is a rotation, which momentum does not notice as long as it stays."""
    shapes = [(6, 9), (9, 6)]
    turned = inside(Svd(), sgd(beta=0.9), 6, refresh=Every(1000, together=True))
    assert_same(walk(ours(turned), shapes), walk(ours(sgd(beta=0.9)), shapes))
    assert not torch.allclose(  # Adam does notice
        walk(ours(inside(Svd(), adam(), 6)), shapes)[0], walk(ours(adam()), shapes)[0], atol=1e-3
    )


@pytest.mark.parametrize("rank", [6, 50, 1.0])
def test_a_full_rank_is_the_inner_transform(rank: int | float):
    assert_same(walk(ours(galore(rank=rank, inner=sgd(beta=0.5)))), walk(ours(sgd(beta=0.5))), rtol=0, atol=0)


def test_frugal_ends_at_signs_and_at_adam():
    assert_same(walk(ours(frugal(density=1.0, every=3))), walk(ours(adam())), rtol=0, atol=0)
    params = walk(ours(frugal(density=0.0, every=3)))
    assert_same(params[:2], walk(ours(sign()))[:2], rtol=0, atol=0)
    assert_same(params[2:], walk(ours(adam()))[2:], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_galore_is_its_formula(shape: tuple[int, int]):
    """A plain loop: U of the gradient every 4 steps, all old projected gradients kept in old coordinates."""
    weight, kept = draw(*shape, seed=0), []
    basis = torch.empty(0)
    for step in range(11):
        grad = gradient(shape, 0, step)
        wide_grad = grad if shape[0] <= shape[1] else grad.mT
        if step % 4 == 0:
            u = torch.linalg.svd(wide_grad, full_matrices=False).U[:, :2]
            basis = u * u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
        kept.append(basis.mT @ wide_grad)
        back = 0.25 * basis @ plain_adam(kept)
        weight = weight * (1 - 0.05 * 0.1) - 0.05 * (back if shape[0] <= shape[1] else back.mT)
    kind = galore(rank=2, every=Every(4, together=True), projector=Svd())
    (found,) = walk(ours(kind, weight_decay=0.1), [shape], 11)
    torch.testing.assert_close(found, weight, rtol=1e-9, atol=1e-9)


def test_the_scale_of_frugal_counts_without_a_subspace_too():
    scaled = walk(ours(frugal(density=0.0, free_scale=0.25), lr=0.2))
    assert_same(scaled[:2], walk(ours(sign(), lr=0.05))[:2])
    assert_same(scaled[2:], walk(ours(adam(), lr=0.2))[2:])


def test_frugal_is_its_formula():
    """A plain loop over entries: Adam on two rows, begun again with others every 4 steps; signs on all others."""
    weight, kept, rows = draw(6, 9, seed=0), [], torch.empty(0)
    for step in range(10):
        grad = gradient((6, 9), 0, step)
        if step % 4 == 0:
            rows, kept = grad.square().sum(1).topk(2).indices, []
        kept.append(grad[rows])
        direction = 0.3 * grad.sign()
        direction[rows] = plain_adam(kept)
        weight = weight - 0.05 * direction
    kind = frugal(density=0.34, every=Every(4, together=True), projector=LargestRows(), free_scale=0.3)
    (found,) = walk(ours(kind), [(6, 9)], 10)
    torch.testing.assert_close(found, weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_frugal_of_entries_is_its_formula(shape: tuple[int, int]):
    """The same with the ten largest entries of 54, whatever their rows are."""
    weight, kept, places = draw(*shape, seed=0).flatten(), [], torch.empty(0)
    for step in range(10):
        grad = gradient(shape, 0, step).flatten()
        if step % 4 == 0:
            places, kept = grad.square().topk(10).indices, []
        kept.append(grad[places])
        direction = grad.sign()
        direction[places] = plain_adam(kept)
        weight = weight - 0.05 * direction
    kind = frugal(density=10 / 54, every=Every(4, together=True), projector=LargestRows(), entries=True)
    (found,) = walk(ours(kind), [shape], 10)
    torch.testing.assert_close(found.flatten(), weight, rtol=1e-9, atol=1e-9)


def test_a_step_of_frugal_has_full_rank_and_one_of_galore_has_not():
    for kind, rank in ((frugal(density=0.2), 12), (galore(rank=2), 2)):
        before, (after,) = draw(12, 15, seed=0), walk(ours(kind), [(12, 15)], 5)
        assert int(torch.linalg.matrix_rank(after - before, rtol=1e-9)) == rank


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (6, 2, 2)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_momentum_through_an_svd(shape: tuple[int, ...], nesterov: bool):
    """With polynomials that converge it is the polar factor; with the usual ones within their bounds of it."""
    weight, momentum = draw(*shape, seed=0).flatten(1), torch.zeros(()).double()
    for step in range(6):
        grad = gradient(shape, 0, step).flatten(1)
        momentum = 0.95 * momentum + 0.05 * grad
        u, _, vt = torch.linalg.svd(0.05 * grad + 0.95 * momentum if nesterov else momentum, full_matrices=False)
        weight = weight - 0.1 * max(1, weight.shape[0] / weight.shape[1]) ** 0.5 * u @ vt
    kind = muon(nesterov=nesterov, polynomials=POLAR_EXPRESS)
    (found,) = walk(ours(kind, lr=0.1), [shape], 6)
    torch.testing.assert_close(found.flatten(1), weight, rtol=0, atol=1e-5)
    before, (after,) = draw(*shape, seed=0), walk(ours(muon(nesterov=nesterov), lr=1.0), [shape], 1)
    values = torch.linalg.svdvals((after - before).flatten(1)) / max(1, weight.shape[0] / weight.shape[1]) ** 0.5
    assert float(values.min()) > 0.3
    assert float(values.max()) < 1.21
    assert len(muon().matrix.parts[1].polynomials) == 5  # type: ignore[attr-defined]
    assert muon().matrix.parts[1].polynomials[0] == MUON  # type: ignore[attr-defined]


def test_muon_is_near_that_of_torch():
    theirs = walk(lambda p: torch.optim.Muon(p, lr=0.05, weight_decay=0.1), [(6, 9), (9, 6)])
    assert_same(walk(ours(muon(), weight_decay=0.1), [(6, 9), (9, 6)]), theirs, rtol=0, atol=0.02)  # bfloat16
    published = walk(ours(muon(precision="bfloat16"), weight_decay=0.1), [(6, 9), (9, 6)])
    assert_same(published, theirs, rtol=0, atol=0.02)
    assert not torch.equal(published[0], walk(ours(muon(), weight_decay=0.1), [(6, 9), (9, 6)])[0])


@pytest.mark.parametrize("polynomials", [(MUON,) * 5, POLAR_EXPRESS], ids=["muon", "polar express"])
def test_rounding_to_bfloat16_lifts_no_singular_value_far_above_one(polynomials):
    """Without a margin, a third of the low-rank matrices end in infinity by the polynomials that converge."""
    for seed in range(40):
        matrix = draw(24, 1 + seed % 24, seed=seed) @ draw(1 + seed % 24, 64, seed=seed + 1)
        found = newton_schulz(matrix, polynomials, dtype=torch.bfloat16)
        assert found.dtype == matrix.dtype
        assert float(torch.linalg.matrix_norm(found, 2)) < (1.03 if polynomials is POLAR_EXPRESS else 1.25)


def test_adafactor_is_its_formula():
    weight, rows, columns = draw(6, 9, seed=0), torch.zeros(6).double(), torch.zeros(9).double()
    for step in range(8):
        grad, keep = gradient((6, 9), 0, step), 1 - (step + 1) ** -0.8
        rows = keep * rows + (1 - keep) * grad.square().mean(1)
        columns = keep * columns + (1 - keep) * grad.square().mean(0)
        direction = grad / (rows.outer(columns) / rows.mean()).sqrt()
        weight = weight - 0.05 * direction / max(1.0, float(direction.square().mean().sqrt()))
    (found,) = walk(ours(adafactor()), [(6, 9)], 8)
    torch.testing.assert_close(found, weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (64, 16, 4, 4)])
def test_states_take_what_the_formulas_say(shape: tuple[int, ...]):
    """In float32: Adam 2 m n, GaLore 2 r n + r m, FRUGAL 2 r n and r numbers of rows, Muon m n, and so on."""
    m, n, rank = 64, 256, 8
    counters = 8
    wanted = {
        adam(): 8 * m * n + counters,
        muon(): 4 * m * n,
        galore(rank=rank): 4 * (2 * rank * n + rank * m) + 4 * counters,
        frugal(density=rank / m): 4 * (2 * rank * n + rank) + 6 * counters,
        frugal(density=rank / m, entries=True): 4 * 3 * rank * n + 6 * counters,
        adafactor(): 4 * (m + n) + counters,
        sign(): 0,
        fira(rank=rank): 4 * (2 * rank * n + rank * m + 1) + 4 * counters,
        apollo(rank=rank): 4 * (2 * rank * n + rank + 1) + 6 * counters,
        apollo_mini(): 4 * (2 * n + 1 + 1) + 6 * counters,
        ldadam(rank=rank): 4 * (2 * rank * n + rank * m + m * n) + 4 * counters,
        ldadam(rank=rank, feedback=False): 4 * (2 * rank * n + rank * m) + 4 * counters,
        soap(): 8 * (m * n + m * m + n * n) + 3 * counters,
        dct_adamw(rank=rank): 4 * (2 * rank * n + rank) + 6 * counters,
        dct_adamw(rank=rank, feedback=True): 4 * (2 * rank * n + rank + m * n) + 6 * counters,
        trion(rank=rank): 4 * (m * n + rank) + 5 * counters,
        aro(): 4 * (m * n + m * m),
        auon(): 4 * m * n,
        hybrid_auon(): 4 * m * n,
        adamp(): 8 * m * n + counters,
        sgdp(): 4 * m * n,
    }
    for kind, number in wanted.items():
        assert state_bytes(kind, torch.empty(shape, device="meta")) == number, kind


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_relative_adafactor_is_that_of_torch(decay: float):
    """At an lr below 1 / sqrt(t), to which it is cut there; scalars have the least size, or their own."""
    shapes = [(6, 9), (9, 6), (7,), ()]
    theirs = walk(lambda params: torch.optim.Adafactor(params, lr=0.05, weight_decay=decay), shapes)
    found = walk(ours(adafactor(relative=True), weight_decay=decay), shapes)
    assert_same(found, theirs, rtol=1e-5, atol=1e-6)  # eps is the square of float32's beside weights of any type
    small = walk(ours(adafactor(relative=True, least=10.0)), shapes)
    assert_same(small, walk(ours(adafactor(), lr=0.5), shapes), rtol=1e-12, atol=1e-12)


def test_squares_are_carried_as_variances():
    """E (R x)^2 = R^2 (E x^2 - (E x)^2) + (R E x)^2 for entries that vary alone."""
    kind, grads = Adam(betas=(0.5, 0.5)), [draw(4, 6, seed=i)[None] for i in range(3)]
    state: Any = kind.init(grads[0], torch.tensor([0]))
    for grad in grads:
        kind.update(grad, state, grad)
    weights = torch.tensor([0.25, 0.5, 1.0]).double() / 1.75  # what betas of a half amount to
    mean = sum(w * g for w, g in zip(weights, grads, strict=True))
    variance = sum(w * (g - mean).square() for w, g in zip(weights, grads, strict=True))
    turn = torch.linalg.qr(draw(4, 4)).Q[None]
    kind.rotate(state, turn)
    torch.testing.assert_close(state["mean"] / (1 - 0.5**3), turn @ mean, **CLOSE)
    wanted = turn.square() @ variance + (turn @ mean).square()
    torch.testing.assert_close(state["square"] / (1 - 0.5**3), wanted, **CLOSE)
