"""Whether target projection and feedback alignment come near back-propagation, and how many bytes they keep.

Small networks on the 10,000 test images of MNIST, of which 8,000 are learned from and 2,000 scored: an MLP, a
convolutional network, and a GRU that reads an image row by row and whose mean state is read out. All use Adam
with the same learning rates to choose from, by the last 1,000 images learned from, with half the epochs; target
projection also has two gains. Random features are hidden layers that stay as drawn. Bytes are the most that
graphs hold at one time in a step, without parameters and inputs.

    python benchmarks/target_projection.py --data DATA --json benchmarks/results/target_projection.json
"""

import argparse
import gzip
import itertools
import time
from pathlib import Path

import torch
from common import Rows, peak_saved_bytes
from torch import nn
from torch.nn import functional

import rankwise
from rankwise.estimators import DirectFeedbackAlignment, FeedbackAlignment, TargetProjection

RATES = (1e-3, 3e-3, 1e-2)
GAINS = (1.0, 3.0)
EPOCHS = {"mlp": 8, "cnn": 4, "gru": 3}


class Reader(nn.Module):
    """Reads rows of an image."""

    def __init__(self, width):
        super().__init__()
        self.rows, self.head = nn.GRU(28, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.rows(x[:, 0])[0].mean(1))


def mlp(depth=2, width=128):
    hidden = [part for i in range(depth) for part in (nn.Linear(width if i else 784, width), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


def cnn():
    convolutions = [nn.Conv2d(1, 8, 5, 2, 2), nn.ReLU(), nn.Conv2d(8, 16, 5, 2, 2), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(784, 10))


NETWORKS = {"mlp": mlp, "cnn": cnn, "gru": lambda: Reader(64)}
METHODS = {
    "back-propagation": None,
    "random features": None,
    "target projection": lambda gain: TargetProjection(cells=2, gain=gain),
    "feedback alignment": lambda gain: FeedbackAlignment(),
    "direct feedback alignment": lambda gain: DirectFeedbackAlignment(),
    "target projection, a quarter of the units": lambda gain: TargetProjection(share=0.25, gain=gain),
}
LEFT_OUT = {(net, "target projection, a quarter of the units") for net in ("mlp", "cnn")}
LEFT_OUT |= {("gru", "feedback alignment")}  # would be exact but for the last layer


def images(folder):
    """Return images (10000, 1, 28, 28) of mean 0 and variance 1, and labels, in an order of their own."""

    def read(name, skip):
        return torch.frombuffer(bytearray(gzip.open(folder / "mnist10k" / name).read()[skip:]), dtype=torch.uint8)

    x = read("t10k-images-idx3-ubyte.gz", 16).view(-1, 1, 28, 28).float()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return ((x - x.mean()) / x.std())[order], read("t10k-labels-idx1-ubyte.gz", 8).long()[order]


def settings(method):
    """Return the learning rates, and gains of targets, to choose from."""
    return list(itertools.product(RATES, GAINS if method.startswith("target") else (None,)))


def built(make, method, gain, seed):
    """Return a network, and what writes gradients of a batch."""
    torch.manual_seed(seed)
    net = make()
    if method == "random features":
        for p in list(net.parameters())[:-2]:
            p.requires_grad_(False)
    if METHODS[method] is None:
        return net, lambda x, y: functional.cross_entropy(net(x), y).backward()
    return net, rankwise.estimate(net, METHODS[method](gain)).backward


def fit(make, method, setting, epochs, seed, learned, scored, batch=128):
    """Train, and return the accuracy, seconds, and bytes kept in a step."""
    lr, gain = setting
    net, backward = built(make, method, gain, seed)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=lr)
    generator, start = torch.Generator().manual_seed(seed), time.perf_counter()
    for _ in range(epochs):
        for some in torch.randperm(len(learned[0]), generator=generator).split(batch):
            optimizer.zero_grad()
            backward(learned[0][some], learned[1][some])
            optimizer.step()
    seconds = time.perf_counter() - start
    some = [each[:batch].clone() for each in learned]
    kept = peak_saved_bytes(lambda: backward(*some), [*net.parameters(), *some])
    with torch.no_grad():
        accuracy = float((net(scored[0]).argmax(1) == scored[1]).double().mean())
    return {"accuracy": accuracy, "seconds": seconds, "kept_bytes": kept}


def tuned(rows, net, method, x, y):
    """Return the best learning rate and gain."""
    accuracies = {}
    for lr, gain in settings(method):
        key = {"part": "settings", "net": net, "method": method, "lr": lr, "gain": gain}
        if not rows.has(**key):
            learned, scored = (x[:7000], y[:7000]), (x[7000:8000], y[7000:8000])
            rows.add(**key, **fit(NETWORKS[net], method, (lr, gain), EPOCHS[net] // 2, 100, learned, scored))
        accuracies[lr, gain] = rows.find(**key)["accuracy"]
    return max(accuracies, key=lambda setting: accuracies[setting])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist10k")
    parser.add_argument("--json", type=Path, default=Path("target_projection.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6])
    options = parser.parse_args()
    x, y = images(options.data)
    rows, learned, scored = Rows(options.json), (x[:8000], y[:8000]), (x[8000:], y[8000:])
    for net, make in NETWORKS.items():
        for method in [method for method in METHODS if (net, method) not in LEFT_OUT]:
            lr, gain = tuned(rows, net, method, x, y)
            for seed in options.seeds:
                key = {"part": "accuracy", "net": net, "method": method, "lr": lr, "gain": gain, "seed": seed}
                if not rows.has(**key):
                    rows.add(**key, **fit(make, method, (lr, gain), EPOCHS[net], seed, learned, scored))
    for depth in options.depths:
        for method in list(METHODS)[:3]:
            lr, gain = tuned(rows, "mlp", method, x, y)
            for seed in options.seeds[:1]:
                key = {"part": "depth", "depth": depth, "method": method, "lr": lr, "gain": gain, "seed": seed}
                if not rows.has(**key):
                    found = fit(
                        lambda depth=depth: mlp(depth),
                        method,
                        (lr, gain),
                        EPOCHS["mlp"] // 2,
                        seed,
                        learned,
                        scored,
                    )
                    rows.add(**key, **found)


if __name__ == "__main__":
    main()
