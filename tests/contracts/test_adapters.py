"""What every exported adapter promises."""

import copy
import dataclasses
import inspect
import json

import pytest
import torch
from contracts.examples import draw
from contracts.problems import correlated, fill
from torch import Generator, Tensor, nn

import rankwise
from rankwise import adapters, linalg
from rankwise.core.methods import Adapter
from rankwise.matrices import Base, Dense, LowRank, StructuredMatrix, from_spec

SETTINGS: dict[str, list[Adapter]] = {
    "Eva": [adapters.Eva(rank=2), adapters.Eva(rank=2, alpha=3.0, whiten=True, centred=False)],
    "Householder": [adapters.Householder(rank=2), adapters.Householder(rank=6)],
    "KronLora": [adapters.KronLora(count=2, rank=1), adapters.KronLora(count=4, rank=2, scale=2.0)],
    "Lora": [
        adapters.Lora(rank=2),
        adapters.Lora(rank=2, alpha=4.0, rank_stabilised=True),
        adapters.Lora(rank=2, magnitudes=True),
        adapters.Lora(rank=2, start=rankwise.initialisers.SingularVectors()),
        adapters.Lora(rank=2, start=rankwise.initialisers.SingularVectors(iterations=2), alpha=3.0),
    ],
    "Snella": [
        adapters.Snella(rank=4),
        adapters.Snella(rank=6, mixed=False, shrink=linalg.hard, density=0.4, scale=2.0),
        adapters.Snella(rank=4, shrink=linalg.magnitude, weight=1.0),
        adapters.Snella(rank=4, kernel=linalg.inner, mixed=False, weight=1.0),
    ],
    "Tera": [adapters.Tera(), adapters.Tera(modes=3, core=2, scale=2.0, seed=5)],
}
NAMES = [  # of those that change a matrix; what stands between layers has tests of its own
    name
    for name in adapters.__all__
    if inspect.isclass(getattr(adapters, name)) and issubclass(getattr(adapters, name), Adapter)
]
BASES = {
    "dense": lambda: Dense(draw(12, 8)),
    "low rank": lambda: LowRank(draw(12, 5), draw(5, 8)),
    "wide": lambda: Dense(draw(8, 12)),
}


@pytest.fixture(params=[(name, i) for name in NAMES for i in range(len(SETTINGS.get(name, [None])))], ids=str)
def method(request: pytest.FixtureRequest) -> Adapter:
    name, i = request.param
    if name not in SETTINGS:
        pytest.fail(f"{name} is exported but tests/contracts/test_adapters.py has no settings of it.")
    return SETTINGS[name][i]


@pytest.fixture(params=sorted(BASES))
def base(request: pytest.FixtureRequest) -> StructuredMatrix:
    return BASES[request.param]()


def attach(method: Adapter, base: StructuredMatrix, seed: int = 0) -> StructuredMatrix:
    m, n = base.shape
    stats = fill(method.needs, correlated(40, n, 3), draw(40, m, seed=4))
    return method.attach(Base(base), stats, Generator().manual_seed(seed))


def moved(matrix: StructuredMatrix) -> StructuredMatrix:
    """The same after a step somewhere."""
    with torch.no_grad():
        for i, p in enumerate(p for p in matrix.parameters() if p.requires_grad):
            p += 0.1 * draw(*p.shape, seed=i)
    return matrix


def test_the_start_is_the_base(method: Adapter, base: StructuredMatrix):
    before, x = base.dense().detach().clone(), draw(3, base.shape[1], seed=5)
    matrix = attach(method, base)
    torch.testing.assert_close(matrix.dense(), before, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(matrix(x), x @ before.mT, rtol=1e-6, atol=1e-6)
    assert torch.equal(base.dense(), before)


def test_it_trains_its_own_numbers_alone(method: Adapter, base: StructuredMatrix):
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    matrix = attach(method, base)
    trained = [p for p in matrix.parameters() if p.requires_grad]
    assert trained
    assert not any(p.requires_grad for p in base.parameters())
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    x, y = draw(30, base.shape[1], seed=5), draw(30, base.shape[0], seed=6)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (matrix(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_forward_and_adjoint_are_those_of_dense(method: Adapter, base: StructuredMatrix):
    matrix = moved(attach(method, base).double())
    m, n = base.shape
    x, y = draw(3, n, seed=5), draw(3, m, seed=6)
    torch.testing.assert_close(matrix(x), x @ matrix.dense().mT)
    torch.testing.assert_close(matrix.adjoint(y), y @ matrix.dense())


def test_spec_and_state_make_it_again(method: Adapter, base: StructuredMatrix):
    matrix = moved(attach(method, base).double())
    again = from_spec(json.loads(json.dumps(matrix.spec())), dtype=torch.float64)
    again.load_state_dict(matrix.state_dict())
    assert torch.equal(again.dense(), matrix.dense())
    names = [[n for n, p in each.named_parameters() if p.requires_grad] for each in (matrix, again)]
    assert names[0] == names[1]


def test_same_seed_same_bits(method: Adapter, base: StructuredMatrix):
    one, two = (attach(method, copy.deepcopy(base), seed=1).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_half_precision_keeps_trained_numbers_in_float32(method: Adapter):
    base = Dense(draw(12, 8).bfloat16())
    matrix = attach(method, base)
    assert all(p.dtype == torch.float32 for p in matrix.parameters() if p.requires_grad)
    x = draw(3, 8, seed=5).bfloat16()
    assert matrix(x).dtype == matrix.dense().dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = matrix(x.float())
    torch.testing.assert_close(y.double(), x.double() @ base.dense().double().mT, rtol=0.05, atol=0.1)


def test_it_compiles_without_breaks(method: Adapter):
    torch.compiler.reset()  # one forward function is compiled only so often in a process
    matrix, x = moved(attach(method, BASES["dense"]()).double()), draw(3, 8, seed=5)
    torch.testing.assert_close(torch.compile(matrix, backend="aot_eager", fullgraph=True)(x), matrix(x))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)).double()


def batches() -> list[Tensor]:
    return [draw(20, 8, seed=i) for i in range(2)]


def test_a_model_is_adapted_and_folded(method: Adapter):
    model, x = net(), draw(3, 8, seed=9)
    before, kinds = model(x).detach(), [type(layer) for layer in model]
    report = rankwise.adapt(model, method, data=batches())
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert json.loads(report.to_json())["method"]["name"] == type(method).__name__
    assert report.totals["trained"] == trained == sum(row["trained"] for row in report.rows) > 0
    for layer in rankwise.adapting.adapted(model).values():
        moved(layer.matrix)
    after = model(x).detach()
    assert not torch.allclose(after, before)
    assert [type(layer) for layer in rankwise.fold(model)] == kinds
    torch.testing.assert_close(model(x), after, rtol=1e-6, atol=1e-6)


def test_a_method_is_a_frozen_value(method: Adapter):
    again = type(method)(**{f.name: getattr(method, f.name) for f in dataclasses.fields(method)})
    assert again == method
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.rank = 3
