"""What samples of layers cost: means of patches without patches, and nothing shared with the model."""

import itertools

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

import rankwise
from rankwise.core.views import Conv2dView
from rankwise.linalg import KhatriRao, reduced
from rankwise.preconditioners import HyLo, Sngd

PAIRS = [(1, 1), (2, 3)]


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [*itertools.product([(1, 1), (3, 2)], PAIRS, [(0, 0), (3, 2)], PAIRS)],
)
def test_means_of_patches_are_those_of_the_patches(kernel, stride, padding, dilation):
    view = Conv2dView(2, kernel, stride, padding, dilation)
    x = torch.randn(3, 2, 9, 8, generator=Generator().manual_seed(0), dtype=torch.float64)
    means = view.means(x)
    assert means is not None
    torch.testing.assert_close(means, view.inputs(x).mean(1))


def written_out(samples: KhatriRao) -> KhatriRao:
    """`reduced` by another name, for which patches are made."""
    return reduced(samples)


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("runs", [1, 2])
def test_reduced_samples_are_those_of_written_out_patches(runs: int, dead: bool):
    found = []
    for sharing in (reduced, written_out):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 3, 3, 2, 1), nn.Tanh(), nn.Conv2d(3, 4, 2, bias=False)).double()
        handle = rankwise.precondition(net, Sngd(damping=0.1, sharing=sharing))
        for _ in range(runs):
            out = net(torch.randn(5, 2, 8, 8, dtype=torch.float64))
            (out[..., 1:] if dead else out).square().sum((1, 2, 3)).mean().backward()
        handle.step()
        found.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    torch.testing.assert_close(*found)


def test_patches_are_not_made_for_reduced_samples(monkeypatch):
    calls = []
    unfold = functional.unfold
    monkeypatch.setattr(
        functional, "unfold", lambda *args, **options: calls.append(1) or unfold(*args, **options)
    )
    for sharing, expected in ((reduced, 0), (written_out, 1)):
        calls.clear()
        net = nn.Conv2d(2, 3, 3)
        handle = rankwise.precondition(net, HyLo(damping=0.1, sharing=sharing))
        net(torch.randn(5, 2, 8, 8)).square().mean().backward()
        handle.step()
        assert len(calls) == expected


@pytest.mark.parametrize("tables", [False, True])
def test_what_is_kept_is_not_the_batch(tables: bool):
    net = nn.Embedding(7, 3) if tables else nn.Linear(4, 3, bias=False)
    batch: Tensor = torch.randint(0, 7, (5, 2)) if tables else torch.randn(5, 4)
    handle = rankwise.precondition(net, Sngd(damping=0.1), tables=tables)
    net(batch).square().mean().backward()
    handle.step()
    kept = next(iter(handle.curvature.values()))["inputs.0"]
    before = kept.clone()
    batch.zero_()
    assert torch.equal(kept, before)
