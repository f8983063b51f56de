"""What orthogonal weights do for a deep plain network: at the start alone, and as a constraint while training.

A tanh network of 60 layers of width 64 learns digits of 8 x 8 points by SGD with momentum 0.9. All starts have
the variances for which mean-field theory says that activations and gradients keep theirs. Each way of training
gets its own learning rate, the best of one grid for one seed that is not used again. Spectra are those of the
Jacobian of the 60 layers, (64, 64), at a few digits, and of the Fisher information of all parameters on 128.

    python benchmarks/orthogonal.py --data DATA --json benchmarks/results/orthogonal.json
"""

import argparse
import math
import time
from pathlib import Path

import torch
from common import Rows
from images import normal, raw_digits
from torch import nn
from torch.nn import functional

from rankwise import Optimizer, fisher_spectrum, jacobian_spectrum
from rankwise.linalg import critical_variances
from rankwise.optimizers import oblique, orthogonal_penalty, sgd, stiefel

WIDTH, VARIANCE, BATCH, GOAL = 64, 1 / 64, 128, 0.3
MOMENTUM = sgd(beta=0.9)
WAYS = {
    "Gaussian, free": ("gaussian", MOMENTUM),
    "orthogonal, free": ("orthogonal", MOMENTUM),
    "orthogonal, penalty": ("orthogonal", orthogonal_penalty(weight=1e-2, inner=MOMENTUM)),
    "orthogonal, columns of one length": ("orthogonal", oblique()),
    "orthogonal, Stiefel": ("orthogonal", stiefel()),
    "orthogonal, Stiefel and scales": ("orthogonal", stiefel(magnitude=MOMENTUM)),
    "Gaussian, Stiefel": ("gaussian", stiefel()),
}


def small(folder):
    """Return images (10000, 64) of mean zero and variance one, and labels."""
    x, labels = raw_digits(folder)
    return normal(functional.avg_pool2d(x[:, :, 2:26, 2:26], 3).flatten(1)), labels


def network(start, depth, seed):
    """Return a network whose layers keep the variance of activations and of gradients."""
    weight, bias = critical_variances(torch.tanh, VARIANCE)
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for i in range(depth + 1):
        layer = nn.Linear(WIDTH, WIDTH if i < depth else 10)
        if start == "orthogonal":
            nn.init.orthogonal_(layer.weight, gain=math.sqrt(weight), generator=generator)
        else:
            nn.init.normal_(layer.weight, std=math.sqrt(weight / WIDTH), generator=generator)
        nn.init.normal_(layer.bias, std=math.sqrt(bias), generator=generator)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def spectra(model, x):
    """Return figures of the Jacobian of the hidden layers and of the Fisher information."""
    jacobian = jacobian_spectrum(model[:-1], x[:4]).totals
    fisher = fisher_spectrum(model, [x[:128]], steps=40, tolerance=0.01)
    found = {key: jacobian[key] for key in ("largest", "median", "smallest", "rms")}
    return {**found, "fisher": fisher.totals["largest"], "residual": fisher.rows[0]["residual"]}


def gap(model):
    """The largest entry of |W' W / s^2 - I| over the hidden layers, s^2 being the mean of W' W's diagonal."""
    worst = 0.0
    for layer in model[:-1:2]:
        gram = layer.weight.detach().double() @ layer.weight.detach().double().mT
        gram = gram / gram.diagonal().mean()
        worst = max(worst, float((gram - torch.eye(WIDTH).double()).abs().max()))
    return worst


def train(way, lr, data, depth, steps, seed, looks):
    """Train, and return what was seen."""
    start, transform = WAYS[way]
    (x, y), (test_x, test_y) = data
    model = network(start, depth, seed)
    hidden, rest = [], []
    for i, layer in enumerate(model[::2]):
        (hidden if i < depth else rest).append(layer.weight)
        rest.append(layer.bias)
    optimizer = Optimizer([(hidden, transform), (rest, MOMENTUM)], lr=lr)
    generator = torch.Generator().manual_seed(seed)
    losses, seen, seconds = [], {}, 0.0
    for step in range(steps + 1):
        if step in looks:
            seen[str(step)] = spectra(model, test_x)
        if step == steps:
            break
        begin = time.perf_counter()
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        loss = functional.cross_entropy(model(x[rows]), y[rows])
        if not bool(loss.isfinite()):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds += time.perf_counter() - begin
        losses.append(float(loss.detach()))
    with torch.no_grad():
        logits = model(test_x)
        test = float(functional.cross_entropy(logits, test_y))
        accuracy = float((logits.argmax(-1) == test_y).double().mean())
    means = torch.tensor(losses).unfold(0, 10, 1).mean(-1)
    reached = [i + 10 for i, each in enumerate(means.tolist()) if each < GOAL]
    last = float(torch.tensor(losses[-50:]).mean()) if len(losses) == steps else math.inf
    return {
        "loss": last if math.isfinite(last) else None,
        "reached": reached[0] if reached else None,
        "test_loss": test if math.isfinite(test) else None,
        "accuracy": accuracy,
        "gap": gap(model),
        "seconds_a_step": seconds / max(len(losses), 1),
        "spectra": seen,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist10k")
    parser.add_argument("--json", type=Path, default=Path("orthogonal.json"))
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--rates", type=float, nargs="+", default=[0.003, 0.01, 0.03, 0.1, 0.3])
    parser.add_argument("--depth", type=int, default=60)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tuning-steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--smoke", action="store_true", help="half a minute instead of several")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.smoke:
        options.depth, options.steps, options.tuning_steps, options.seeds = 10, 40, 20, [0]
        options.rates = [0.01, 0.1]
    images, labels = small(options.data)
    data = (images[:8000], labels[:8000]), (images[8000:], labels[8000:])
    rows = Rows(options.json)
    common = {"depth": options.depth}
    tuning = {"part": "tuning", "steps": options.tuning_steps, **common}
    for way in options.ways:
        for lr in options.rates:
            if not rows.has(way=way, lr=lr, **tuning):
                found = train(way, lr, data, options.depth, options.tuning_steps, 1000, ())
                rows.add(way=way, lr=lr, loss=found["loss"], **tuning)
    looks = [round(share * options.steps) for share in (0, 0.1, 0.3, 1)]
    for seed in options.seeds:
        for way in options.ways:
            tried = [rows.find(way=way, lr=lr, **tuning) for lr in options.rates]
            lr = min((row for row in tried if row["loss"] is not None), key=lambda row: row["loss"])["lr"]
            run = {"part": "run", "way": way, "seed": seed, "lr": lr, "steps": options.steps, **common}
            if not rows.has(**run):
                rows.add(**run, **train(way, lr, data, options.depth, options.steps, seed, looks))


if __name__ == "__main__":
    main()
