"""Where weighting by the loss wins: inputs of which half are irrelevant (FWSVD)."""

import torch
from contracts.examples import draw
from torch import Generator, nn

import rankwise
from rankwise.compressors import FisherSvd, PlainSvd

RELEVANT, SIZE, CLASSES = 6, 12, 4


def trained() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A classifier of which only the first half of the inputs decides, the others having large weights."""
    x, truth = draw(2000, SIZE).float(), draw(RELEVANT, CLASSES, seed=1).float()
    target = (x[:, :RELEVANT] @ truth).argmax(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, 24), nn.ReLU(), nn.Linear(24, CLASSES))
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(300):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimiser.step()
    with torch.no_grad():  # large weights on inputs that are always small
        model[0].weight[:, RELEVANT:] = 8 * torch.randn(24, RELEVANT, generator=Generator().manual_seed(2))
    x[:, RELEVANT:] *= 1e-3
    return model, x, target


def accuracy(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> float:
    return float((model(x).argmax(1) == target).float().mean())


def test_fisher_weights_keep_the_accuracy_that_plain_svd_loses():
    found = {}
    for method in (
        FisherSvd(gauge="factors", rank_multiple=RELEVANT),
        PlainSvd(gauge="factors", rank_multiple=RELEVANT),
    ):
        model, x, target = trained()
        before = accuracy(model, x, target)
        data = list(x.split(100))  # labels are drawn from the model, whose gradients on its own data vanish
        report = rankwise.compress(
            model,
            method,
            keep=0.75,
            data=data,
            where=lambda name, _: name == "0",
        )
        assert report.rows[0]["rank"] == RELEVANT
        found[type(method)] = before - accuracy(model, x, target)
    assert found[FisherSvd] < 0.02
    assert found[PlainSvd] > 0.2
