"""A frozen random network scaled by trained vectors: its forms agree, and do what few numbers can."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from contracts.examples import draw
from tiny import ids, llama
from torch import Generator, Tensor, nn

import rankwise
from rankwise.adapters import Tera
from rankwise.adapters.tera import balanced_factors
from rankwise.matrices import Base, Dense, Diagonal, Kronecker, Seeded, StructuredMatrix


def attach(method: Tera, m: int, n: int) -> StructuredMatrix:
    return method.attach(Base(Dense(torch.zeros(m, n, dtype=torch.float64))), {}, Generator())


def vectors(matrix: StructuredMatrix) -> list[nn.Parameter]:
    return [p for p in matrix.parameters() if p.requires_grad]


def filled(matrix: StructuredMatrix, seed: int = 0) -> StructuredMatrix:
    for i, p in enumerate(vectors(matrix)):
        p.data = draw(len(p), seed=seed + i)
    return matrix


def frozen(matrix: StructuredMatrix) -> list[Tensor]:
    """The factors of the outputs, the core and the factors of the inputs, in float64."""
    return [part.dense().double() for part in matrix.modules() if isinstance(part, Seeded)]


def test_mode_products_are_the_kronecker_form_and_the_dense_one():
    """W = s G x_1 (F_1 D_1) ... x_4 (F_4 D_4), summed entry by entry, in float64."""
    method = Tera(core=3, scale=0.7)
    matrix = filled(attach(method, 12, 20))
    d = [p.detach() for p in vectors(matrix)]
    f1, f2, core, g3, g4 = frozen(matrix)
    sizes = [*balanced_factors(12, 2), *balanced_factors(20, 2)]
    kept = [min(size, 3) for size in sizes]
    tensor = core.view(*kept)
    scale = 0.7 / math.sqrt(20 * math.prod(kept))
    modes = torch.einsum(
        "abcd,ia,jb,ck,dl->ijkl", tensor, f1 * d[0], f2 * d[1], d[2][:, None] * g3, d[3][:, None] * g4
    )
    expected = scale * modes.reshape(12, 20)
    left, right = torch.kron(f1 * d[0], f2 * d[1]), torch.kron(d[2][:, None] * g3, d[3][:, None] * g4)
    torch.testing.assert_close(scale * left @ core @ right, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix.dense(), expected, rtol=0, atol=1e-12)
    x, y = draw(3, 20, seed=9), draw(3, 12, seed=10)
    torch.testing.assert_close(matrix(x), x @ expected.mT, rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix.adjoint(y), y @ expected, rtol=0, atol=1e-12)


def test_three_kronecker_factors_are_those_of_torch():
    parts = [draw(2, 3), draw(3, 1, seed=1), draw(2, 2, seed=2)]
    expected = torch.kron(torch.kron(parts[0], parts[1]), parts[2])
    matrix, x = Kronecker(*map(Dense, parts)), draw(4, 6, seed=3)
    torch.testing.assert_close(matrix(x), x @ expected.mT)
    assert matrix.macs == 2 * 1 * 2 * 3 + 2 * 2 * 3 * 1 + 2 * 3 * 2 * 2
    torch.testing.assert_close(Kronecker(Dense(parts[0])).dense(), parts[0])


def test_the_forward_pass_writes_nothing_out():
    matrix, largest = filled(attach(Tera(core=4), 64, 64)), 0
    x = draw(2, 64).requires_grad_()

    def pack(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        matrix.get_submodule("members.1")(x)
    assert largest <= max(16 * 16, x.numel())  # the core; neither of the (64, 16) bases


def test_few_numbers_of_full_rank_and_a_core_of_one_of_rank_one():
    matrix = filled(attach(Tera(), 64, 64))
    assert sum(p.numel() for p in vectors(matrix)) == 4 * 8
    assert int(torch.linalg.matrix_rank(matrix.dense())) == 64
    assert int(torch.linalg.matrix_rank(filled(attach(Tera(core=1), 64, 64)).dense())) == 1


def test_entries_have_the_variance_that_the_scale_says():
    squares = []
    for seed in range(60):
        matrix = attach(Tera(scale=3.0, seed=100 * seed), 16, 36)
        for p in vectors(matrix):
            nn.init.ones_(p)
        squares.append(float(matrix.dense().detach().square().mean()))
    assert sum(squares) / 60 == pytest.approx(9 / 36, rel=0.15)


def gradients(matrix: StructuredMatrix) -> list[float]:
    loss = (matrix(draw(5, 12)) - draw(5, 12, seed=1)).square().sum()
    return [float(g.norm()) for g in torch.autograd.grad(loss, vectors(matrix))]


def test_the_one_vector_at_zero_gets_all_of_the_gradient():
    matrix = attach(Tera(), 12, 12)
    first, *others = gradients(matrix)
    assert first > 0
    assert others == [0.0] * 3
    assert [bool(p.any()) for p in vectors(matrix)] == [False, True, True, True]


def test_from_two_vectors_at_zero_nothing_would_ever_train():
    """Why the method has no way to ask for it."""
    for pair in itertools.combinations(range(4), 2):
        matrix = filled(attach(Tera(), 12, 12))
        for i in pair:
            nn.init.zeros_(vectors(matrix)[i])
        assert gradients(matrix) == [0.0] * 4


def fitted(matrix: StructuredMatrix, target: Tensor, steps: int) -> float:
    """Squared error of the best fit, relative to the target."""
    optimizer = torch.optim.LBFGS(
        vectors(matrix), max_iter=steps, line_search_fn="strong_wolfe", tolerance_change=1e-14
    )
    size = target.square().sum()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (matrix.dense() - target).square().sum() / size
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return float((matrix.dense() - target).square().sum() / size)


def test_a_teacher_of_the_family_is_recovered_and_a_low_rank_one_is_not():
    """The negative control: 24 numbers cannot follow 1296 of another family."""
    teacher = attach(Tera(scale=4.0), 36, 36)
    for i, p in enumerate(vectors(teacher)):
        p.data = 1 + 0.5 * draw(len(p), seed=i)
    assert fitted(attach(Tera(scale=4.0), 36, 36), teacher.dense().detach(), 300) < 1e-6
    assert fitted(attach(Tera(scale=4.0), 36, 36), draw(36, 4) @ draw(4, 36, seed=1), 100) > 0.8


def test_numbers_of_a_seed_are_those_of_the_mersenne_twister():
    """Another implementation of the generator gives the same bits: the low 24 of each 32."""
    raw = np.random.RandomState(7).randint(0, 2**32, size=(40, 30), dtype=np.uint64)
    uniform = (raw % 2**24).astype(np.float32) / np.float32(2**24)
    expected = (2 * uniform - 1) * np.float32(math.sqrt(3))
    assert np.array_equal(Seeded(40, 30, seed=7).dense().numpy(), expected)


def test_layers_of_one_shape_share_their_frozen_numbers_in_memory_and_store_none():
    net = nn.Sequential(*[nn.Linear(24, 24) for _ in range(3)])
    report = rankwise.adapt(net, Tera())
    seeded = [part for part in net.modules() if isinstance(part, Seeded)]
    assert len(seeded) == 3 * 5
    assert len({part.dense().data_ptr() for part in seeded}) == 5
    own = sum(sum(vector) for vector in [[6, 4, 6, 4]] * 3)
    assert report.totals["trained"] == own
    stored = {name: t for name, t in net.state_dict().items() if ".members.1." in name}
    assert sum(t.numel() for t in stored.values()) == own + len(seeded)
    assert copy.deepcopy(seeded[0]).dense().data_ptr() == seeded[0].dense().data_ptr()


def test_a_saved_model_draws_them_again(tmp_path):
    model = llama()
    rankwise.adapt(model, Tera())
    for p in model.parameters():
        if p.requires_grad:
            p.data = draw(*p.shape, dtype=torch.float32)
    expected = model(ids()).logits
    rankwise.save(model, tmp_path / "out", format="rankwise")
    other = llama()
    rankwise.load_adapter(other, tmp_path / "out")
    assert torch.equal(other(ids()).logits, expected)
    seeded = [part for part in other.modules() if isinstance(part, Seeded)]
    assert len({part.dense().data_ptr() for part in seeded}) < len(seeded) / 2


def test_they_are_let_go_with_the_last_layer():
    from rankwise.matrices import seeded

    matrix = Seeded(3, 5, seed=12345)
    key = (12345, (3, 5), torch.device("cpu"))
    assert key in seeded._SHARED
    del matrix
    assert key not in seeded._SHARED


def test_another_seed_does_not_fit_the_stored_checksum():
    state = Seeded(4, 3, seed=1).state_dict()
    with pytest.raises(RuntimeError, match="seed 2 does not draw"):
        Seeded(4, 3, seed=2).load_state_dict(state)
    Seeded(4, 3, seed=1).load_state_dict(state)


def test_a_frozen_matrix_moves_by_way_of_meta():
    matrix = Seeded(4, 3, seed=1)
    expected = matrix.dense().clone()
    assert matrix.to("meta").dense().is_meta
    empty = matrix.to_empty(device="cpu")
    assert torch.equal(empty.dense(), expected)


@pytest.mark.parametrize("size", [1, 2, 7, 12, 64, 97, 360, 4096, 11008, 14336, 49152])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_sizes_are_split_by_their_prime_factors(size: int, count: int):
    parts = balanced_factors(size, count)
    assert math.prod(parts) == size
    assert len(parts) <= count
    assert parts == sorted(parts, reverse=True)
    assert min(parts) > 1 or parts == [1]


def test_primes_and_single_rows_are_sizes_too():
    matrix = filled(attach(Tera(), 1, 13))
    assert [len(p) for p in vectors(matrix)] == [1, 13]
    assert matrix.dense().shape == (1, 13)
    assert matrix.dense().any()


def test_vectors_scale_what_they_are_part_of():
    """The gauge: a factor moved from one vector to another changes nothing."""
    matrix = filled(attach(Tera(), 12, 12))
    before = matrix.dense().detach()
    one, two, *_ = (part for part in matrix.modules() if isinstance(part, Diagonal))
    one.values.data *= 3
    two.values.data /= 3
    torch.testing.assert_close(matrix.dense(), before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modes": 0}, "modes must be an integer >= 1"),
        ({"core": 0}, "core must be an integer >= 1"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"scale": 0.0}, "positive"),
        ({"scale": math.inf}, "positive"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Tera(**fields)


def test_seeds_of_specs_are_checked():
    for seed in (None, -1, 2**63, True):
        with pytest.raises(ValueError, match="seed must be an integer"):
            Seeded.empty({"kind": "Seeded", "shape": [2, 2], "seed": seed})
