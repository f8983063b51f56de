"""How far natural gradients from few rows are from those of all rows: the gradient-error experiment of HyLo.

At the beginning, in the middle and late in the training of a small network, several batches are preconditioned
by all of their samples and by few: interpolated (KID), sampled (KIS), sampled with weights, and interpolated with
the released optimiser's division by kept rows. Each row has the mean over batches of |v - v_exact| / |v_exact|
and of the cosine, over the gradients of all layers together, in float64 on one process. ``over`` is what
``HyLo.neglected`` says of the layer where it is largest: far above one no low rank can work. The last row of each
phase and damping compares one product for each sample (``reduced``) with the samples as they are.

    python benchmarks/gradient_error.py --data DATA --json benchmarks/results/gradient_error.json
"""

import argparse
import itertools
import time
from pathlib import Path

import torch
from common import Rows
from images import digits, pictures
from torch import nn
from torch.nn import functional

import rankwise
from rankwise.linalg import reduced
from rankwise.preconditioners import HyLo, Sngd

METHODS = {
    "KID": lambda rank, damping: HyLo(mode="kid", rank=rank, damping=damping),
    "KID, divided by kept rows": lambda rank, damping: HyLo(
        mode="kid", rank=rank, damping=damping, kept_only=True
    ),
    "KIS": lambda rank, damping: HyLo(mode="kis", rank=rank, damping=damping),
    "KIS, reweighted": lambda rank, damping: HyLo(mode="kis", rank=rank, damping=damping, reweight=True),
}


def perceptron():
    """784-128-64-10."""
    layers = nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    return nn.Sequential(*layers).double()


def convolutions():
    """Three convolutions of stride 2 and a linear layer."""
    widths, layers = (3, 16, 32, 32), []
    for n, m in itertools.pairwise(widths):
        layers += [nn.Conv2d(n, m, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 16, 10)).double()


def phases(model, x, y, steps, batch, rate):
    """Train with Adam, and yield the name of each phase when it is reached, with the mean loss before it."""
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=rate), []
    rng, done = torch.Generator().manual_seed(1), 0
    for phase, until in steps.items():
        for _ in range(until - done):
            rows = torch.randint(len(x), (batch,), generator=rng)
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        done = until
        yield phase, sum(losses[-20:]) / 20 if losses else functional.cross_entropy(model(x), y).item()


def natural(model, x, y, method, seed=0):
    """Return the natural gradient of all layers as a vector, and the largest share left out over damping."""
    handle = rankwise.precondition(model, method, seed=seed)
    model.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    handle.step()
    handle.remove()
    left = method.neglected(handle) if isinstance(method, HyLo) else {}
    over = max((each["over_damping"] for each in left.values()), default=None)
    return torch.cat([p.grad.flatten() for p in model.parameters()]), over


def compared(pairs):
    """Return the mean relative error and cosine of pairs of a vector and the right one."""
    errors = [((v - right).norm() / right.norm()).item() for v, right in pairs]
    cosines = [functional.cosine_similarity(v, right, dim=0).item() for v, right in pairs]
    return {"error": sum(errors) / len(errors), "cosine": sum(cosines) / len(cosines)}


def main():
    """Run what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="the result; an existing one is continued")
    parser.add_argument("--data", required=True, type=Path, help="folder with mnist10k/ and cifar10_jpg/")
    parser.add_argument("--samples", type=int, default=256, help="of a batch")
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--ranks", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.5, 1.0])
    parser.add_argument("--dampings", type=float, nargs="+", default=[10.0, 1.0, 0.1])
    options = parser.parse_args()
    rows = Rows(Path(options.json))
    tasks = {
        "MLP, MNIST": (perceptron, digits(options.data), {"init": 0, "mid": 60, "late": 600}),
        "CNN, CIFAR-10": (convolutions, pictures(options.data, 2000), {"init": 0, "mid": 100, "late": 800}),
    }
    for task, (build, (x, y), steps) in tasks.items():
        torch.manual_seed(0)
        model, x = build(), x.double()
        picked = [torch.randint(len(x), (options.samples,)) for _ in range(options.batches)]
        batches = [(x[each], y[each]) for each in picked]
        for phase, loss in phases(model, x, y, steps, 64, 2e-3):
            for damping in options.dampings:
                measure(rows, {"task": task, "phase": phase, "damping": damping}, model, batches, options, loss)


def measure(rows, key, model, batches, options, loss):
    """Fill the rows of one task, phase and damping."""
    damping, start = key["damping"], time.perf_counter()
    whole = Sngd(damping=damping, sharing=reduced)
    right = [natural(model, *batch, whole)[0] for batch in batches]
    for name, method in METHODS.items():
        for rank in options.ranks:
            if rows.has(**key, method=name, rank=rank):
                continue
            found = [natural(model, *batch, method(rank, damping), i) for i, batch in enumerate(batches)]
            pairs = [(v, wanted) for (v, _), wanted in zip(found, right, strict=True)]
            overs = [over for _, over in found if over is not None]
            row = {**compared(pairs), "over": sum(overs) / len(overs) if overs else None, "loss": loss}
            rows.add(**key, method=name, rank=rank, **row)
    if not rows.has(**key, method="reduced"):
        true = [natural(model, *batch, Sngd(damping=damping))[0] for batch in batches]
        pairs = [*zip(right, true, strict=True)]
        rows.add(**key, method="reduced", rank=1.0, **compared(pairs), over=None, loss=loss)
    print(f"{time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
