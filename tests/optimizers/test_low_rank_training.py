"""Optimisers on structured matrices: WeLore's factors, SLTrain's sums."""

import pytest
import torch
from contracts.examples import draw
from torch import Tensor, nn

import rankwise
from rankwise import Optimizer, starts
from rankwise.core.surgery import structured
from rankwise.core.transforms import Transform
from rankwise.optimizers import adam, frugal, galore, muon, sgd


def low_rank_model() -> tuple[nn.Module, Tensor]:
    """Two layers that became low-rank, one that stayed dense, and a normalisation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.LayerNorm(24), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 5))
    method = rankwise.compressors.PlainSvd(gauge="factors")
    rankwise.compress(model, method, keep=0.5, where=lambda name, _: name in ("0", "2"))
    return model, draw(64, 24).float()


@pytest.mark.parametrize("transform", [adam(), galore(rank=2, every=2)], ids=["adam", "galore"])
def test_welore_trains_low_rank_matrices_alone(transform: Transform):
    model, x = low_rank_model()
    report = rankwise.trainable_low_rank(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = Optimizer([(params, transform)], lr=0.01, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {f"{i}.matrix.{part}" for i in (0, 2) for part in ("left", "right")}
    numbers = sum(row["trainable"] for row in report.rows)
    assert sum(p.numel() for p in params) == numbers == report.totals["trainable"]
    if transform == adam():
        assert optimizer.state_bytes() == 2 * 4 * numbers + 8 * len(params)


def test_balanced_factors_stay_balanced_under_short_steps():
    """U'U - V V' is zero after an SVD split evenly, and is conserved by gradient flow."""
    model, x = low_rank_model()
    model.double()
    rankwise.trainable_low_rank(model)
    factors = model[0].matrix

    def unbalance() -> float:
        left, right = factors.left.detach(), factors.right.detach()
        return float((left.mT @ left - right @ right.mT).norm())

    scale = float((factors.left.detach().mT @ factors.left.detach()).norm())
    assert unbalance() < 1e-5 * scale
    drifts = []
    for lr in (1e-2, 1e-3):
        params = [p for p in model.parameters() if p.requires_grad]
        saved = [p.detach().clone() for p in params]
        optimizer = Optimizer([(params, sgd())], lr=lr)
        for _ in range(round(0.1 / lr)):
            optimizer.zero_grad()
            model(x.double()).square().mean().backward()
            optimizer.step()
        drifts.append(unbalance())
        with torch.no_grad():
            for p, value in zip(params, saved, strict=True):
                p.copy_(value)
    assert drifts[1] < 0.2 * drifts[0] < 0.02 * scale


def texts() -> Tensor:
    """Tokens that follow from those before, (64, 12)."""
    ids = torch.randint(32, (64, 12), generator=torch.Generator().manual_seed(0))
    for t in range(2, 12):
        ids[:, t] = (ids[:, t - 1] + 3 * ids[:, t - 2]) % 32
    return ids


class Characters(nn.Module):
    """The next token from the last two."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(32, 32), nn.RMSNorm(64)
        self.layers = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.table(ids)
        return self.layers(self.norm(torch.cat([rows[:, :-2], rows[:, 1:-1]], -1)))


def loss_after(
    transform: Transform, lr: float, start: bool, steps: int = 60
) -> tuple[float, nn.Module, Optimizer]:
    torch.manual_seed(1)
    model, ids = Characters(), texts()
    if start:
        method = starts.SparsePlusLowRankStart(rank=8, density=0.1, alpha=8.0)
        rankwise.initialise(model, method, where=lambda name, _: name in ("layers.0", "layers.2"))
    optimizer = Optimizer([(model.parameters(), transform)], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids[:, 2:].flatten())
        loss.backward()
        optimizer.step()
    return float(loss.detach()), model, optimizer


OPTIMIZERS = {
    "adam": (adam(), 0.01),
    "galore": (galore(rank=4, every=20, scale=1.0), 0.01),
    "frugal": (frugal(every=20), 0.003),
    "muon": (muon(), 0.01),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sltrain_trains_from_scratch(name: str):
    """With any optimiser: factors are matrices to it, the sparse values a vector; places stay."""
    transform, lr = OPTIMIZERS[name]
    first, untrained, _ = loss_after(transform, lr, start=True, steps=1)
    last, model, optimizer = loss_after(transform, lr, start=True)
    assert last < 0.75 * first
    for layer, fresh in zip(structured(model).values(), structured(untrained).values(), strict=True):
        scaled, sparse = layer.matrix.matrix.parts
        assert torch.equal(sparse.columns, fresh.matrix.matrix.parts[1].columns)
        low_rank = scaled.matrix
        for part in (low_rank.left, low_rank.right, sparse.values):
            assert part in optimizer.state
        assert int(torch.linalg.matrix_rank(low_rank.dense())) <= 8
        assert int(torch.linalg.matrix_rank(layer.matrix.dense())) > 8


def test_sltrain_needs_less_state_than_dense_weights_and_galore_less_still():
    sizes = {}
    for start in (False, True):
        for name in ("adam", "galore"):
            sizes[name, start] = loss_after(*OPTIMIZERS[name], start=start, steps=1)[2].state_bytes()
    assert sizes["adam", True] < 0.6 * sizes["adam", False]
    assert sizes["galore", True] < sizes["adam", True]
    assert sizes["galore", False] < sizes["adam", False]
