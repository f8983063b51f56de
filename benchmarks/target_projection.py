"""Whether target projection and feedback alignment come near back-propagation, and how many bytes they keep.

Small networks on the 10,000 test images of MNIST, of which 6,000 are learned from, 2,000 choose settings and
2,000 are scored once: an MLP, a convolutional network, and a GRU that reads an image row by row and whose mean
state is read out. Adam trains all. Every method has as many trials, with half the epochs and a seed of their
own, in a search that starts at one place and has no ends: of the best point so far the neighbours are tried, at
other learning rates and, if the method has a gain, at other gains; first half a power of ten apart, and nearer
where none is better. Images that choose are not learned from later on, either. Random features are hidden
layers that stay as drawn. Depths take the settings of two hidden layers. Bytes are the most that graphs hold at
one time in a step, without parameters and inputs.

    python benchmarks/target_projection.py --data DATA --json benchmarks/results/target_projection.json
"""

import argparse
import time
from pathlib import Path

import torch
from common import Rows, peak_saved_bytes
from images import digits
from torch import nn
from torch.nn import functional

import rankwise
from rankwise.estimators import DirectFeedbackAlignment, FeedbackAlignment, TargetProjection

START, UNIT = (3e-3, 1.0), 10 ** (1 / 16)  # learning rate and gain; what the search counts in
STRIDES = (8, 4, 2, 1, 16, 24, 12, 6)  # the last look farther away where trials are left
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
    "feedback alignment": lambda gain: FeedbackAlignment(gain=gain),
    "direct feedback alignment": lambda gain: DirectFeedbackAlignment(gain=gain),
    "target projection, a quarter of the units": lambda gain: TargetProjection(share=0.25, gain=gain),
}
LEFT_OUT = {(net, "target projection, a quarter of the units") for net in ("mlp", "cnn")}
LEFT_OUT |= {("gru", "feedback alignment")}  # would be exact but for the last layer


def shuffled(folder):
    """Return images (10000, 1, 28, 28) of mean 0 and variance 1, and labels, in an order of their own."""
    x, labels = digits(folder)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x.view(-1, 1, 28, 28)[order], labels[order]


def search(score, axes, trials):
    """Return the best point (axes,) of whole numbers found from zero, and whether worse ones are on all sides.

    Args:
        score: of a point, the higher the better.
        axes: how many numbers.
        trials: how many points have their score asked for.
    """
    seen = {(0,) * axes: score((0,) * axes)}
    for stride in STRIDES:
        while len(seen) < trials:
            new = [each for each in around(max(seen, key=seen.get), stride) if each not in seen]
            if not new:
                break
            seen[new[0]] = score(new[0])
    best = max(seen, key=seen.get)
    return best, all(min(places) < best[i] < max(places) for i, places in enumerate(zip(*seen, strict=True)))


def around(point, stride):
    """Return the points to both sides of one."""
    sides = [(i, step) for i in range(len(point)) for step in (stride, -stride)]
    return [(*point[:i], point[i] + step, *point[i + 1 :]) for i, step in sides]


def has_gain(method):
    return METHODS[method] is not None


def setting(point):
    """Return the learning rate, and the gain or None."""
    lr, *gain = (float(f"{start * UNIT**i:.3g}") for start, i in zip(START, point, strict=False))
    return lr, gain[0] if gain else None


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
    """Train, and return the accuracy, seconds, and bytes kept in a step; the accuracy is 0 if it diverges."""
    lr, gain = setting
    net, backward = built(make, method, gain, seed)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=lr)
    generator, start = torch.Generator().manual_seed(seed), time.perf_counter()
    for _ in range(epochs):
        for some in torch.randperm(len(learned[0]), generator=generator).split(batch):
            optimizer.zero_grad()
            try:
                backward(learned[0][some], learned[1][some])
            except FloatingPointError:
                return {"accuracy": 0.0, "seconds": time.perf_counter() - start, "kept_bytes": 0}
            optimizer.step()
    seconds = time.perf_counter() - start
    some = [each[:batch].clone() for each in learned]
    kept = peak_saved_bytes(lambda: backward(*some), [*net.parameters(), *some])
    with torch.no_grad():
        accuracy = float((net(scored[0]).argmax(1) == scored[1]).double().mean())
    return {"accuracy": accuracy, "seconds": seconds, "kept_bytes": kept}


def tuned(rows, net, method, data, trials):
    """Return the best learning rate and gain, and whether the search saw worse ones to both sides of them."""
    learned, asked, _ = data

    def score(point):
        lr, gain = setting(point)
        key = {
            "part": "settings",
            "net": net,
            "method": method,
            "images": len(learned[0]),
            "lr": lr,
            "gain": gain,
        }
        if not rows.has(**key):
            rows.add(**key, **fit(NETWORKS[net], method, (lr, gain), EPOCHS[net] // 2, 100, learned, asked))
        return rows.find(**key)["accuracy"]

    best, inside = search(score, 2 if has_gain(method) else 1, trials)
    return {**dict(zip(("lr", "gain"), setting(best), strict=True)), "inside": inside}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist10k")
    parser.add_argument("--json", type=Path, default=Path("target_projection.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--trials", type=int, default=16, help="of each method on each network")
    parser.add_argument("--images", type=int, default=6000, help="to learn from, at most 6000")
    parser.add_argument("--smoke", action="store_true", help="half a minute instead of ten")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.depths, options.trials, options.images = [0], [1, 2], 4, 300
    torch.set_num_threads(1)
    x, y = shuffled(options.data)
    data = [(x[part], y[part]) for part in (slice(options.images), slice(6000, 8000), slice(8000, None))]
    rows, (learned, _, judged) = Rows(options.json), data
    for net, make in NETWORKS.items():
        for method in [method for method in METHODS if (net, method) not in LEFT_OUT]:
            found = tuned(rows, net, method, data, options.trials)
            for seed in options.seeds:
                key = {"part": "accuracy", "net": net, "method": method, "images": len(learned[0]), "seed": seed}
                if not rows.has(**key, **found):
                    at = found["lr"], found["gain"]
                    rows.add(**key, **found, **fit(make, method, at, EPOCHS[net], seed, learned, judged))
    for depth in options.depths:
        for method in list(METHODS)[:3]:
            found = tuned(rows, "mlp", method, data, options.trials)
            key = {"part": "depth", "depth": depth, "method": method, "images": len(learned[0]), "seed": 0}
            if not rows.has(**key, **found):
                make, at = lambda depth=depth: mlp(depth), (found["lr"], found["gain"])
                rows.add(**key, **found, **fit(make, method, at, EPOCHS["mlp"] // 2, 0, learned, judged))


if __name__ == "__main__":
    main()
