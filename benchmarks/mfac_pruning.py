"""A trained ResNet-20 pruned by magnitude, by the diagonal of the Fisher matrix, and by M-FAC.

All convolutions and the last layer, one sparsity over all of them. Both Fisher methods see the same gradients
in as many rounds; all are then trained alike, on the same batches with zeros kept zero. The learning rate, and
whether norms see the batch or keep their running statistics, are those of a few that are best for the method with
the first seed on images kept aside. Another seed takes other images for the gradients and another order for
training. Scored on test images, before and after.

    python benchmarks/mfac_pruning.py --data DATA --json benchmarks/results/mfac_pruning.json
"""

import argparse
import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from cifar import ResNet, images, trained
from common import Rows
from torch import Tensor, nn
from torch.nn import functional

import rankwise
from rankwise.compressors import MFacPruning
from rankwise.core import labels
from rankwise.core.choices import Choices
from rankwise.core.methods import Compressor
from rankwise.core.statistics import BatchGradients, Stats
from rankwise.linalg import largest
from rankwise.matrices import Sparse


@dataclass(frozen=True)
class Diagonal(Compressor):
    """Drop the weights of least w^2 f for a curvature f (m, n), and leave the others as they are."""

    comparable: ClassVar[bool] = True

    def curvature(self, weight: Tensor, stats: Stats) -> Tensor:
        return torch.ones_like(weight)

    def choices(self, weight: Tensor, stats: Stats) -> Choices:
        (m, n), size = weight.shape, self.curvature(weight, stats)
        damage = weight.double().square() * size.double() / 2
        left = int((weight != 0).sum())
        kept = torch.linspace(-4.5, 5, 39).sigmoid().mul(left).round().long().clamp_min(1).unique()
        kept = kept if left == m * n else torch.cat([kept[kept < left], torch.tensor([left])])
        errors = damage.flatten().sort().values.cumsum(0)[m * n - 1 - kept]

        def build(i: int, weight: Tensor = weight, stats: Stats = stats) -> Sparse:
            return Sparse.from_dense(weight, largest(damage, int(kept[i])))

        return Choices(
            costs={"params": kept, "bytes": kept * 4, "macs": kept},
            errors=errors,
            total=float(damage.sum()),
            build=build,
            refit=build,
            error_of=lambda change: float((change.double().square() * size).sum() / 2),
        )


class Fisher(Diagonal):
    """The mean squared gradients of the batches."""

    needs = (BatchGradients,)

    def curvature(self, weight: Tensor, stats: Stats) -> Tensor:
        return stats[BatchGradients].value().square().mean(0)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the labels that are right."""
    model.eval()
    with torch.no_grad():
        right = [model(a).argmax(1) == b for a, b in zip(x.split(250), y.split(250), strict=True)]
    return float(torch.cat(right).float().mean())


def healed(
    model: nn.Module, x: Tensor, y: Tensor, *, lr: float, still: bool, steps: int, batch: int, seed: int
) -> nn.Module:
    """Train a copy, zeros staying zero, and the statistics of norms too if they are to be still."""
    model = copy.deepcopy(model).train(not still).requires_grad_(True)
    masks = {p: p.detach() != 0 for p in model.parameters() if p.dim() > 1}
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(x), (batch,), generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        with torch.no_grad():
            for parameter, mask in masks.items():
                parameter *= mask
    return model


def main():
    """Prune, score, train, score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True)
    parser.add_argument("--data", required=True, help="folder with resnet_cifar10 and cifar10_jpg")
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--gradients", type=int, default=64)
    parser.add_argument("--images", type=int, default=8, help="of each gradient")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--test", type=int, default=2000, help="images")
    parser.add_argument("--train", type=int, default=5000, help="images")
    parser.add_argument("--aside", type=int, default=500, help="images")
    parser.add_argument("--lr", type=float, nargs="+", default=[0.003, 0.01, 0.03])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    data, rows = Path(options.data), Rows(Path(options.json))
    test = images(data, "test", options.test // 10)
    train = images(data, "train", options.train // 10)
    aside = images(data, "train", options.aside // 10, skip=options.train // 10)
    dense = trained(data)
    few, many = {"rounds": 1}, {"rounds": options.rounds}
    methods = {
        "magnitude": (Diagonal(), few),
        "M-FAC": (MFacPruning(), many),
        "diagonal Fisher": (Fisher(), many),
    }
    about = {name: getattr(options, name) for name in ("keep", "gradients", "images", "steps", "batch")}
    training = {"steps": options.steps, "batch": options.batch}
    if not rows.has(method="dense"):
        rows.add(method="dense", before=accuracy(dense, *test))
    ways = [{"lr": lr, "still": still} for lr in options.lr for still in (False, True)]
    best: dict[str, dict] = {row["method"]: {k: row[k] for k in ways[0]} for row in rows.rows if "lr" in row}
    for seed in range(options.seeds):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(train[0]), generator=generator)[: options.gradients * options.images]
        batches = [(train[0][i], train[1][i]) for i in chosen.split(options.images)]
        for name, (method, rounds) in methods.items():
            if rows.has(method=name, seed=seed):
                continue
            model, start = ResNet().eval(), time.perf_counter()
            model.load_state_dict(dense.state_dict())
            how = {"data": batches, "of": "macs", "labels": labels.given, **rounds}
            report = rankwise.compress_gradually(model, method, keep=options.keep, **how)
            seconds = time.perf_counter() - start
            rankwise.fold(model)
            if name not in best:
                tried = [accuracy(healed(model, *train, **way, seed=0, **training), *aside) for way in ways]
                best[name] = ways[tried.index(max(tried))]
            after = healed(model, *train, **best[name], seed=seed, **training)
            rows.add(
                **{"method": name, "seed": seed, **rounds, **about, **best[name], "seconds": seconds},
                kept=report.totals["keep"]["macs"],
                before=accuracy(model, *test),
                after=accuracy(after, *test),
            )


if __name__ == "__main__":
    main()
