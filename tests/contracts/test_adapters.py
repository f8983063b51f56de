"""What every exported adapter promises."""

import copy
import dataclasses
import inspect
import json
from pathlib import Path

import pytest
import torch
from contracts.examples import draw
from contracts.problems import correlated, fill
from safetensors.torch import load_file
from torch import Generator, Tensor, nn

import rankwise
from rankwise import adapters, linalg
from rankwise.core.methods import Adapter
from rankwise.matrices import Base, BlockAffine, Dense, LowRank, StructuredMatrix, Sum, from_spec

SETTINGS: dict[str, list[Adapter]] = {
    "AdaLora": [adapters.AdaLora(rank=3, target=2), adapters.AdaLora(rank=2, target=1, alpha=3.0, tail=0.0)],
    "Eva": [adapters.Eva(rank=2), adapters.Eva(rank=2, alpha=3.0, whiten=True, centred=False)],
    "FactorLora": [adapters.FactorLora(rank=2), adapters.FactorLora(rank=3, alpha=6.0)],
    "GradNormLorp": [
        adapters.GradNormLorp(rank=2, dropout=0.0),
        adapters.GradNormLorp(
            rank=2, alpha=None, dropout=0.0, constant=False, start=rankwise.initialisers.Uniform()
        ),
    ],
    "Lamda": [adapters.Lamda(rank=2), adapters.Lamda(rank=8, alpha=3.0, until=1.0)],
    "Bat": [adapters.Bat(block=4), adapters.Bat(block=2)],
    "Loldu": [adapters.Loldu(rank=3), adapters.Loldu(rank=8, alpha=None)],
    "Householder": [adapters.Householder(rank=2), adapters.Householder(rank=6)],
    "KronLora": [adapters.KronLora(count=2, rank=1), adapters.KronLora(count=4, rank=2, scale=2.0)],
    "Lora": [
        adapters.Lora(rank=2),
        adapters.Lora(rank=2, alpha=4.0, rank_stabilised=True),
        adapters.Lora(rank=2, magnitudes=True),
        adapters.Lora(rank=2, magnitudes=True, alpha=3.0, start=rankwise.initialisers.SingularVectors()),
        adapters.Lora(rank=2, start=rankwise.initialisers.SingularVectors()),
        adapters.Lora(rank=2, start=rankwise.initialisers.SingularVectors(iterations=2), alpha=3.0),
        adapters.Lora(rank=2, start=rankwise.initialisers.GradientSvd(), alpha=4.0, rank_stabilised=True),
        adapters.Lora(rank=2, start=rankwise.initialisers.GradientSvd(gamma=None)),
        adapters.Lora(rank=2, start=rankwise.initialisers.NormalOutputs()),
    ],
    "Miss": [adapters.Miss(rank=3), adapters.Miss(rank=4, mini=2)],
    "Pissa": [adapters.Pissa(rank=2), adapters.Pissa(rank=3, iterations=2, alpha=6.0)],
    "Svfit": [adapters.Svfit(energy=0.9), adapters.Svfit(rank=3, relative=True)],
    "Snella": [
        adapters.Snella(rank=4),
        adapters.Snella(rank=6, mixed=False, shrink=linalg.hard, density=0.4, scale=2.0),
        adapters.Snella(rank=4, density=0.9, target=0.3),
        adapters.Snella(rank=4, shrink=linalg.magnitude, weight=1.0),
        adapters.Snella(rank=4, kernel=linalg.inner, mixed=False, weight=1.0),
    ],
    "Tera": [adapters.Tera(), adapters.Tera(modes=3, core=2, scale=2.0, seed=5)],
    "Sst": [adapters.Sst(rank=2, hold=3), adapters.Sst(rank=1, components=3, hold=1, warmup=0)],
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
    """As it is used, not trained: what has a schedule would refuse otherwise."""
    m, n = base.shape
    stats = fill(method.needs, correlated(40, n, 3), draw(40, m, seed=4))
    return method.attach(Base(base), stats, Generator().manual_seed(seed)).eval()


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
    rankwise.follow(matrix.train(), optimizer, steps=8)
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


@pytest.mark.slow
def test_it_compiles_without_breaks(method: Adapter):
    torch.compiler.reset()  # what other tests compiled counts towards torch's limit
    torch.compiler.reset()  # one forward function is compiled only so often in a process
    matrix, x = moved(attach(method, BASES["dense"]()).double()), draw(3, 8, seed=5)
    torch.testing.assert_close(torch.compile(matrix, backend="aot_eager", fullgraph=True)(x), matrix(x))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)).double().eval()


def batches() -> list[Tensor]:
    return [draw(20, 8, seed=i) for i in range(2)]


def toward_zero(output: Tensor, batch: Tensor, generator: Generator) -> Tensor:
    """A loss for a model whose outputs are no logits."""
    return output.square().sum()


def test_a_model_is_adapted_and_folded(method: Adapter):
    model, x = net(), draw(3, 8, seed=9)
    before, kinds = model(x).detach(), [type(layer) for layer in model]
    report = rankwise.adapt(model, method, data=batches(), labels=toward_zero)
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert json.loads(report.to_json())["method"]["name"] == type(method).__name__
    assert report.totals["trained"] == trained == sum(row["trained"] for row in report.rows) > 0
    for layer in rankwise.core.adapted.adapted(model).values():
        moved(layer.matrix)
    after = model(x).detach()
    assert not torch.allclose(after, before)
    assert [type(layer) for layer in rankwise.fold(model)] == kinds
    torch.testing.assert_close(model(x), after, rtol=1e-6, atol=1e-6)


def squares(output: Tensor, batch: tuple[Tensor, Tensor], generator: Generator) -> Tensor:
    """A loss for outputs that are no logits, of batches with labels."""
    return output.float().square().sum()


def test_a_model_cast_after_it_was_adapted_has_one_type(method: Adapter):
    model, x = net().float(), draw(3, 8, seed=9).bfloat16()
    rankwise.adapt(model, method, data=[batch.float() for batch in batches()], labels=toward_zero)
    model.bfloat16()
    data = [(draw(6, 8, seed=i).bfloat16(), torch.zeros(6, dtype=torch.long)) for i in range(4)]
    for train in (False, True):
        if train:
            rankwise.finetune(model, data, loss=squares, steps=4, autocast=torch.bfloat16)
        kinds = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
        assert kinds == {torch.bfloat16}
        y = model(x).detach()
        folded = rankwise.fold(copy.deepcopy(model)) if rankwise.core.surgery.structured(model) else model
        assert {p.dtype for p in folded.parameters()} == {y.dtype} == {torch.bfloat16}
        torch.testing.assert_close(folded(x), y, rtol=0.05, atol=0.05)


def test_a_written_adapter_is_the_same_again(method: Adapter, tmp_path: Path):
    model, x = net(), draw(3, 8, seed=9)
    rankwise.adapt(model, method, data=batches(), labels=toward_zero, also=lambda name: name == "2.bias")
    for layer in rankwise.core.adapted.adapted(model).values():
        moved(layer.matrix)
    with torch.no_grad():
        model[2].bias += 1
    rankwise.save(model, tmp_path / "adapter", format="rankwise")
    again = net()
    report = rankwise.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(x), model(x))
    for one, two in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert one[0] == two[0]
        assert one[1].requires_grad == two[1].requires_grad
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert report.totals["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    names = {name for file in tmp_path.glob("*/*.safetensors") for name in load_file(file)}
    bases = tuple(f"{path}." for path, part in model.named_modules() if isinstance(part, Base))
    assert bases
    assert not any(name.startswith(bases) for name in names)


def test_a_method_is_a_frozen_value(method: Adapter):
    again = type(method)(**{f.name: getattr(method, f.name) for f in dataclasses.fields(method)})
    assert again == method
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.rank = 3


def test_what_adds_nothing_yet_keeps_the_bits_of_a_layer_with_a_bias(method: Adapter):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 48)).bfloat16().eval(), draw(4, 40, 64, seed=5).bfloat16()
    before, data = model(x), [draw(80, 64, seed=6).bfloat16()]
    rankwise.adapt(model, method, data=data, labels=squares)
    matrix = model[0].matrix
    if not isinstance(matrix, Sum | BlockAffine) or matrix.added(x, matrix(x)).any():
        pytest.skip("it is not the base and something that is exactly zero")
    assert torch.equal(model(x), before)
    assert torch.equal(model(x[0]), before[0])
