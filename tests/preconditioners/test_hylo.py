"""Few rows for each process: equal to all rows where nothing is left out, and bounded where something is."""

import dataclasses
from collections.abc import Sequence

import pytest
import scipy.linalg
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

import rankwise
from rankwise.core.capture import Rows
from rankwise.core.preconditioner import Curvature, Preconditioner, Shared
from rankwise.linalg import KhatriRao, averaged, exact, reduced
from rankwise.preconditioners import HyLo, Sngd

M, N = 4, 5  # a layer's outputs and inputs
KINDS = {
    "kid": HyLo(mode="kid"),
    "kid, kept only": HyLo(mode="kid", kept_only=True),
    "kis": HyLo(mode="kis"),
    "kis, reweighted": HyLo(mode="kis", reweight=True),
    "exact": HyLo(mode="exact"),
}


def rows(count: int, positions: int = 1, seed: int = 0) -> KhatriRao:
    """Samples of a layer, of unequal sizes."""
    rng = Generator().manual_seed(seed)
    inputs = torch.randn(count, positions, N, dtype=torch.float64, generator=rng)
    sizes = torch.logspace(0, -1.5, count, dtype=torch.float64)[:, None, None]
    return KhatriRao(inputs, sizes * torch.randn(count, positions, M, dtype=torch.float64, generator=rng), N)


def with_fields(method: HyLo, **fields) -> HyLo:
    return dataclasses.replace(method, **fields)


def learnt(method: Preconditioner, parts: Sequence[KhatriRao], damping: float) -> Curvature:
    """The curvature after an exchange between as many processes as there are parts."""
    samples = sum(map(len, parts))
    told = [
        method.local([Rows(part, len(part))], {}, Generator().manual_seed(7 + i), samples, damping)
        for i, part in enumerate(parts)
    ]
    sums = {name: torch.stack([each.sums[name] for each in told]).sum(0) for name in told[0].sums}
    every = {name: torch.cat([each.rows[name] for each in told]) for name in told[0].rows}
    curvature: Curvature = {}
    method.update(Shared(sums, every), samples, curvature)
    return curvature | method.invert(curvature, damping, [(M, N)])


def matrix(method: Preconditioner, parts: Sequence[KhatriRao], damping: float) -> Tensor:
    """What multiplies gradients, written out, (M N, M N)."""
    curvature = learnt(method, parts, damping)
    basis = torch.eye(M * N, dtype=torch.float64).view(-1, M, N)
    return torch.stack([method.apply([v], curvature, damping)[0].flatten() for v in basis], 1)


def columns(samples: KhatriRao) -> Tensor:
    """U, (M N, R)."""
    return samples.matrices().flatten(1).mT


def inverse(fisher: Tensor, damping: float) -> Tensor:
    return torch.linalg.inv(fisher + damping * torch.eye(len(fisher), dtype=fisher.dtype))


class TestAllRows:
    """Where nothing is left out it is the exact method."""

    @pytest.mark.parametrize("rank", [1.0, 13, 1000])
    @pytest.mark.parametrize("sharing", [exact, reduced], ids=["exact", "reduced"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_on_one_process(self, kind: str, sharing, rank):
        samples = rows(13, positions=3)
        method = with_fields(KINDS[kind], rank=rank, sharing=sharing)
        wanted = matrix(Sngd(sharing=sharing), [samples], 0.05)
        torch.testing.assert_close(matrix(method, [samples], 0.05), wanted, rtol=1e-11, atol=1e-11)

    @pytest.mark.parametrize("kind", KINDS)
    def test_on_several_of_unequal_sizes(self, kind: str):
        samples = rows(15)
        parts = [samples.take(torch.arange(15)[low:high]) for low, high in ((0, 7), (7, 8), (8, 8), (8, 15))]
        u = columns(samples)
        wanted = inverse(u @ u.mT / 15, 0.05)
        found = matrix(with_fields(KINDS[kind], rank=1.0), parts, 0.05)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)

    def test_the_mode_exact_is_the_other_method_bit_by_bit(self):
        samples = rows(9, positions=2)
        one, other = HyLo(mode="exact", sharing=exact), Sngd()
        assert torch.equal(matrix(one, [samples], 0.1), matrix(other, [samples], 0.1))

    def test_rows_that_need_not_be_kept_do_not_change_what_kept_ones_are_divided_by(self):
        samples = rows(4).take(torch.tensor([0, 1, 2, 3, 0, 1]))
        u = columns(samples)
        found = matrix(HyLo(mode="kid", rank=1.0, kept_only=True), [samples], 0.05)
        torch.testing.assert_close(found, inverse(u @ u.mT / 6, 0.05), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("kind", ["kid", "kis"])
    def test_copies_and_zeros_need_no_rows(self, kind: str):
        few = rows(4)
        zeros = few.take(torch.tensor([0, 0])).scaled(0.0)
        found = KhatriRao(
            torch.cat([few.inputs, zeros.inputs]), torch.cat([few.gradients, zeros.gradients]), few.width
        )
        copies = torch.arange(6) if kind == "kis" else torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 5])
        samples = found.take(copies)
        u = columns(samples)
        method = with_fields(KINDS[kind], rank=4)
        wanted = inverse(u @ u.mT / len(samples), 0.05)
        torch.testing.assert_close(matrix(method, [samples], 0.05), wanted, rtol=1e-9, atol=1e-9)
        curvature = learnt(with_fields(method, rank=1.0), [samples], 0.05)
        assert len(curvature["gradients.0"]) == 4


class TestLowRank:
    """What it is with few rows."""

    @pytest.mark.parametrize("parts", [1, 2])
    @pytest.mark.parametrize("kept_only", [False, True])
    def test_interpolation_is_the_formula_of_explicit_matrices(self, kept_only: bool, parts: int):
        """Both forms of M, with P from least squares on the rows that a pivoted QR of U takes."""
        n, rank, damping = 10, 3, 0.1
        each = [rows(n, seed=seed) for seed in range(parts)]
        kept, blocks = [], []
        over = 1 if kept_only else n * parts
        for samples in each:
            u = columns(samples)
            chosen = torch.tensor(scipy.linalg.qr(u.numpy(), pivoting=True)[2][:rank].tolist())
            p = torch.linalg.lstsq(u[:, chosen], u).solution
            rest = u - u[:, chosen] @ p
            d = rest.mT @ rest / over + damping * torch.eye(n, dtype=u.dtype)
            kept.append(u[:, chosen])
            blocks.append(p @ torch.linalg.inv(d) @ p.mT)
        u_s, b = torch.cat(kept, 1), torch.block_diag(*blocks)
        count = rank * parts if kept_only else n * parts
        k = u_s.mT @ u_s / count
        m = b - b @ torch.linalg.inv(torch.linalg.inv(k) + b) @ b
        inverse_free = b - b @ k @ torch.linalg.inv(torch.eye(len(b), dtype=b.dtype) + b @ k) @ b
        torch.testing.assert_close(inverse_free, m, rtol=1e-10, atol=1e-10)
        wanted = (torch.eye(M * N, dtype=b.dtype) - u_s @ m @ u_s.mT / count) / damping
        found = matrix(HyLo(mode="kid", rank=rank, kept_only=kept_only), each, damping)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)

    def test_sampling_divides_by_the_rows_that_are_kept(self):
        samples, damping = rows(12), 0.1
        method = HyLo(mode="kis", rank=5)
        given = learnt(method, [samples], damping)["inputs.0"]
        which = torch.tensor([[torch.equal(x, y) for y in samples.inputs].index(True) for x in given])
        assert len({*which.tolist()}) == 5
        u = columns(samples.take(which))
        found = matrix(method, [samples], damping)
        torch.testing.assert_close(found, inverse(u @ u.mT / 5, damping), rtol=1e-10, atol=1e-10)

    def test_reweighted_sampling_is_unbiased(self):
        """The mean of U_s S U_s'/N over draws, along some directions, within what the variance allows."""
        samples, trials, count = rows(8), 1500, 3
        u, squares = columns(samples), samples.squared_norms()
        ways = torch.linalg.qr(torch.randn(M * N, 6, dtype=u.dtype, generator=Generator().manual_seed(0)))[0]
        x = (ways.mT @ u).square() / len(samples)  # what each row adds along each direction
        p = squares / squares.sum()
        deviation = (((x.square() / p).sum(1) - x.sum(1) ** 2) / (count * trials)).sqrt()
        method, mean = HyLo(mode="kis", rank=count, reweight=True), torch.zeros(6, dtype=u.dtype)
        rng = Generator().manual_seed(1)
        for _ in range(trials):
            told = method.local([Rows(samples, 8)], {}, rng, 8, 0.1)
            kept = columns(KhatriRao(told.rows["inputs.0"], told.rows["gradients.0"], N))
            mean += (ways.mT @ kept).square().sum(1) / 8 / trials
        assert bool(((mean - x.sum(1)).abs() < 4.5 * deviation).all())
        plain = HyLo(mode="kis", rank=count)  # the negative control: without weights large rows count too much
        told = [plain.local([Rows(samples, 8)], {}, rng, 8, 0.1).rows for _ in range(300)]
        sizes = [float(each["gradients.0"].square().sum()) for each in told]
        assert sum(sizes) / 300 > 1.3 * float(samples.gradients.square().sum())

    @pytest.mark.parametrize("damping", [1e-4, 0.1, 10.0])
    @pytest.mark.parametrize("parts", [1, 3])
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_is_symmetric_with_eigenvalues_up_to_one_over_damping(self, kind: str, parts: int, damping: float):
        each = [rows(9, seed=seed) for seed in range(parts)]
        found = matrix(with_fields(KINDS[kind], rank=0.4), each, damping)
        torch.testing.assert_close(found, found.mT, rtol=0, atol=1e-11 / damping)
        values = torch.linalg.eigvalsh(found)
        assert float(values.min()) > 0
        assert float(values.max()) <= (1 + 1e-10) / damping

    @pytest.mark.parametrize("damping", [1e-4, 1e-2, 0.1, 1.0])
    @pytest.mark.parametrize("rank", [1, 3, 6, 10])
    def test_the_error_of_interpolation_is_bounded(self, rank: int, damping: float):
        """By (e + sqrt e) / a with e = min(1, |E| / (N a)): nothing but U - U_s P, orthogonal to U_s, is lost."""
        samples = rows(12)
        u = columns(samples)
        method = HyLo(mode="kid", rank=rank)
        error = matrix(method, [samples], damping) - inverse(u @ u.mT / 12, damping)
        kept = learnt(method, [samples], damping)
        chosen = columns(KhatriRao(kept["inputs.0"], kept["gradients.0"], N))
        rest = u - chosen @ torch.linalg.lstsq(chosen, u).solution
        e = min(1.0, float(torch.linalg.matrix_norm(rest, 2)) ** 2 / (12 * damping))
        assert float(torch.linalg.matrix_norm(error, 2)) <= (e + e**0.5) / damping * (1 + 1e-9)

    @pytest.mark.parametrize("kind", KINDS)
    def test_much_damping_leaves_the_gradient(self, kind: str):
        found = matrix(with_fields(KINDS[kind], rank=0.3), [rows(9), rows(9, seed=1)], 1e9)
        torch.testing.assert_close(1e9 * found, torch.eye(M * N, dtype=found.dtype), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("kind", KINDS)
    def test_one_sample_or_one_row_or_none(self, kind: str):
        method = with_fields(KINDS[kind], rank=1)
        u = columns(rows(1))
        wanted = inverse(u @ u.mT, 0.1)
        torch.testing.assert_close(matrix(method, [rows(1)], 0.1), wanted, rtol=1e-11, atol=1e-11)
        assert bool(matrix(method, [rows(9)], 0.1).isfinite().all())
        nothing = rows(3).scaled(0.0)
        torch.testing.assert_close(matrix(method, [nothing], 0.1), 10 * torch.eye(M * N, dtype=u.dtype))

    @pytest.mark.parametrize("kind", ["kid", "kis"])
    def test_float32_is_close(self, kind: str):
        samples, found = rows(40), []
        for dtype in (torch.float32, torch.float64):
            each = KhatriRao(samples.inputs.to(dtype), samples.gradients.to(dtype), N)
            method = with_fields(KINDS[kind], rank=40 if kind == "kis" else 6)
            curvature = learnt(method, [each], 0.01)
            found.append(method.apply([torch.ones(M, N, dtype=dtype)], curvature, 0.01)[0].double())
        assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-4

    @pytest.mark.parametrize(("rank", "kept"), [(0.1, 1), (0.25, 2), (0.5, 4), (3, 3), (20, 8), (1.0, 8), (1, 1)])
    @pytest.mark.parametrize("mode", ["kid", "kis"])
    def test_rows_that_are_kept(self, mode: str, rank, kept: int):
        assert len(learnt(HyLo(mode=mode, rank=rank), [rows(8)], 0.1)["inputs.0"]) == kept

    def test_the_released_mean_of_positions_acts_as_much_more_damping(self):
        """(F / T^2 + a)^-1 = T^2 (F + a T^2)^-1."""
        samples, positions = rows(7, positions=4), 4
        for mode in ("exact", "kid"):
            found = matrix(HyLo(mode=mode, rank=3, sharing=averaged), [samples], 0.01)
            wanted = matrix(HyLo(mode=mode, rank=3, sharing=reduced), [samples], 0.01 * positions**2)
            torch.testing.assert_close(found, positions**2 * wanted, rtol=1e-10, atol=1e-9)


def small() -> tuple[nn.Module, Tensor]:
    """An embedding, a convolution over tokens, and a linear layer."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.convolution = nn.Embedding(7, 4), nn.Conv2d(4, 3, (3, 1), padding=(1, 0))
            self.out = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.convolution(self.table(x).mT[..., None])).mean((2, 3)))

    torch.manual_seed(0)
    return Tokens().double(), torch.randint(0, 7, (8, 5))


@pytest.mark.parametrize("sharing", [exact, reduced], ids=["exact", "reduced"])
@pytest.mark.parametrize("mode", ["kid", "kis", "exact"])
def test_embeddings_and_convolutions_with_all_rows(mode: str, sharing):
    found = []
    for method in (Sngd(sharing=sharing), HyLo(mode=mode, rank=1.0, sharing=sharing)):
        model, x = small()
        handle = rankwise.precondition(model, method, tables=True)
        functional.cross_entropy(model(x), torch.arange(8) % 3).backward()
        handle.step()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


class TestSwitch:
    """When ``auto`` interpolates and when it samples."""

    def test_it_follows_the_norms_of_summed_gradients(self):
        method = HyLo(window=2, threshold=0.5)
        gradient, state = torch.ones(2, 3), {}
        found = []
        #       sums:  2        2 (0 %)   5 (150 %)  4 (20 %)  0 (100 %: they cancel)
        for size in (1, 1, 0.5, 1.5, 2.5, 2.5, 2, 2, 3, -3):
            method.observe([size * gradient], state, 0.1)
            found.append(bool(state.get("critical", True)))
        assert found == [True, True, True, False, False, True, True, False, False, True]

    def test_rows_are_interpolated_then_sampled_and_after_a_restart_interpolated_again(self):
        model, x = small()
        method = HyLo(window=2, every=1, rank=2, threshold=1e9)
        handle = rankwise.precondition(model, method)
        interpolated = []
        for step in range(7):
            if step == 5:
                method.restart(handle)
            functional.cross_entropy(model(x), torch.arange(8) % 3).backward()
            handle.step()
            interpolated.append(["mix" in curvature for curvature in handle.curvature.values()])
            assert bool(method.neglected(handle)) == all(interpolated[-1])
        assert interpolated == [[True] * 2] * 4 + [[False] * 2] + [[True] * 2] * 2

    def test_other_modes_watch_nothing(self):
        state: Curvature = {}
        HyLo(mode="kid").observe([torch.ones(2, 3)], state, 0.1)
        assert state == {}


def test_what_is_neglected_is_told():
    samples = rows(10)
    handle = rankwise.precondition(nn.Linear(N, M, bias=False).double(), HyLo(mode="kid", rank=3))
    handle.curvature[""] = learnt(handle.method, [samples], 0.1)
    u = columns(samples)
    chosen = torch.tensor(scipy.linalg.qr(u.numpy(), pivoting=True)[2][:3].tolist())
    rest = u - u[:, chosen] @ torch.linalg.lstsq(u[:, chosen], u).solution
    (found,) = handle.method.neglected(handle).values()
    assert found["share"] == pytest.approx(float(rest.square().sum() / u.square().sum()), rel=1e-9)
    assert found["over_damping"] == pytest.approx(float((rest.mT @ rest).norm()) / (10 * 0.1), rel=1e-9)
    assert found["over_damping"] * 0.1 >= float(torch.linalg.eigvalsh(u.mT @ u / 10).flip(0)[3])


@pytest.fixture(scope="module")
def trained() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """A small network on four classes of noisy waves, at the beginning, in the middle and near the end."""
    torch.manual_seed(0)
    time = torch.linspace(0, 6, 24, dtype=torch.float64)
    labels = torch.arange(128) % 4
    phases = torch.rand(128, 1, dtype=torch.float64) * 2
    x = torch.sin((labels[:, None] / 2 + 1) * time + phases) + 0.3 * torch.randn(128, 24, dtype=torch.float64)
    found = {}
    for phase, steps in (("first", 0), ("middle", 40), ("late", 300)):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 4)).double()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            functional.cross_entropy(net(x), labels).backward()
            optimizer.step()
        found[phase] = (net, x, labels)
    return found


def direction(model: nn.Module, x: Tensor, y: Tensor, method: Preconditioner, seed: int = 0) -> Tensor:
    handle = rankwise.precondition(model, method, seed=seed)
    model.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    handle.step()
    handle.remove()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def error(task: tuple[nn.Module, Tensor, Tensor], method: HyLo, seeds: int) -> float:
    """The mean relative error over some draws."""
    wanted = direction(*task, Sngd(damping=method.damping))
    errors = [(direction(*task, method, seed) - wanted).norm() / wanted.norm() for seed in range(seeds)]
    return float(torch.stack(errors).mean())


@pytest.mark.slow
def test_more_rows_are_better_and_interpolation_beats_sampling(trained):
    shares = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
    dampings = {"first": 0.1, "middle": 0.03, "late": 1e-4}  # the Fisher matrix shrinks with the loss
    for phase, task in trained.items():
        kid = [error(task, HyLo(mode="kid", rank=share, damping=dampings[phase]), 1) for share in shares]
        kis = [error(task, HyLo(mode="kis", rank=share, damping=dampings[phase]), 6) for share in shares]
        assert kid == sorted(kid, reverse=True)
        assert kis == sorted(kis, reverse=True)
        assert kid[-1] < 1e-11 > kis[-1]
        if phase != "first":
            assert all(one < 0.5 * other for one, other in zip(kid[:-1], kis[:-1], strict=True))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": 0}, "rank must be"),
        ({"rank": 1.5}, "rank must be"),
        ({"rank": True}, "rank must be"),
        ({"mode": "kfac"}, "mode must be"),
        ({"every": 0}, "every must be"),
        ({"window": 0}, "window must be"),
        ({"threshold": 0.0}, "threshold must be"),
        ({"damping": 0.0}, "damping must be"),
    ],
)
def test_wrong_fields(fields, words: str):
    with pytest.raises(ValueError, match=words):
        HyLo(**fields)
