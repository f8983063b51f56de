"""Whether a certificate of a trained character model is ever passed, and what a bounded model costs in loss.

A small transformer of blended attention and MLP blocks is trained under each constraint. Its certificate, from
the mean of token and position vectors to the logits, is then set against ratios |f(x) - f(y)| / |x - y| of pairs
that gradient ascent drives up, from texts with a few characters changed and from random rows, in float64. Rows
have norms up to one; each point on the way of an ascent counts as a pair.

    python benchmarks/lipschitz.py --data DATA --json benchmarks/results/lipschitz.json
"""

import argparse
import itertools
import math
import time
from pathlib import Path

import torch
from common import Rows, read, texts
from torch import nn
from torch.nn import functional

from rankwise import Optimizer, lipschitz_bound
from rankwise.core.combining import chain
from rankwise.layers import Blend, BoundedAttention, UnitGelu
from rankwise.linalg import POLAR_EXPRESS, odd_range
from rankwise.optimizers import (
    adam,
    hard_cap,
    lipschitz,
    row_cap,
    sgd,
    soft_cap,
    spectral_hammer,
    spectral_normalize,
)


def methods(limit):
    """Return transforms of matrices, learning rates and weight decay, for a limit of their norms."""
    longest = odd_range(POLAR_EXPRESS, 1.0)[1]
    return {
        "none": (lipschitz(constraint=sgd()), 0.05, 0.0),
        "weight decay": (lipschitz(constraint=sgd()), 0.05, longest / limit),
        "soft cap": (lipschitz(limit=limit), 0.05, 0.0),
        "soft cap, measured": (lipschitz(constraint=soft_cap(limit=limit)), 0.05, 0.0),
        "hard cap": (lipschitz(constraint=hard_cap(limit=limit)), 0.05, 0.0),
        "normalise": (lipschitz(constraint=spectral_normalize(limit=limit)), 0.05, 0.0),
        "hammer": (lipschitz(constraint=spectral_hammer(limit=limit)), 0.05, 0.0),
        "adam, soft cap": (chain(adam(betas=(0.9, 0.95)), soft_cap(limit=limit)), 0.003, 0.0),
    }


class Characters(nn.Module):
    """A certified network behind tables of characters and positions, whose mean has norm at most one."""

    def __init__(self, letters, width, heads, blocks, window):
        super().__init__()
        self.tokens, self.places = nn.Embedding(letters, width), nn.Embedding(window, width)
        layers, share = [], 1 / (2 * blocks)
        for _ in range(blocks):
            inner = nn.Linear(width, 4 * width, bias=False), UnitGelu(), nn.Linear(4 * width, width, bias=False)
            layers += [Blend(BoundedAttention(width, heads), share), Blend(nn.Sequential(*inner), share)]
        self.network = nn.Sequential(*layers, nn.Linear(width, letters, bias=False))
        self.temperature = nn.Parameter(
            torch.tensor(math.log(10.0))
        )  # outside of the certificate, as a loss's is

    def rows(self, ids):
        """(k, t) -> (k, t, width), of norm at most one."""
        return (self.tokens(ids) + self.places(torch.arange(ids.shape[1]))) / 2

    def forward(self, ids):
        """(k, t) -> (k, t, letters)."""
        return self.network(self.rows(ids)) * self.temperature.exp()


def train(model, transform, lr, decay, data, steps, batch, window, generator):
    """Train, with a learning rate that falls to zero."""
    tables = [model.tokens.weight, model.places.weight, model.temperature]
    groups = [
        {"params": list(model.network.parameters()), "transform": transform, "lr": lr, "weight_decay": decay},
        {"params": tables, "transform": chain(adam(), row_cap()), "lr": 0.01},
    ]
    optimizer = Optimizer(groups, lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps + 1)
    for _ in range(steps):
        ids = sample(data, batch, window + 1, generator)
        loss = functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def sample(data, batch, window, generator):
    """Draw windows of a text."""
    begin = torch.randint(len(data) - window, (batch, 1), generator=generator)
    return data[begin + torch.arange(window)]


def norm(rows):
    """The largest root mean square of a row: (k, t, n) -> (k,)."""
    return rows.square().mean(-1).sqrt().amax(-1)


def within(rows, radius):
    """Shorten rows that are too long."""
    return rows / (rows.square().mean(-1, keepdim=True).sqrt() / radius).clamp_min(1)


def attack(model, data, pairs, batch, ascents, window, generator):
    """Return the ratios of pairs: each begins as text and changed text, or near random rows, and is driven up."""
    network, ratios = model.network, []
    for turn in itertools.count():
        ids = sample(data, batch, window, generator)
        other = torch.where(torch.rand(ids.shape, generator=generator) < 0.05, ids.flip(0), ids)
        x, y = (model.rows(each).detach() for each in (ids, other))
        if turn % 2:
            x = within(torch.randn(x.shape, generator=generator, dtype=x.dtype), 1.0)
        size = 10 ** (-4 * torch.rand(batch, 1, 1, generator=generator, dtype=x.dtype))
        y = within((x if turn % 2 else y) + size * torch.randn(x.shape, generator=generator, dtype=x.dtype), 1.0)
        for _ in range(ascents):
            x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
            ratio = norm(network(x) - network(y)) / norm(x - y)
            ratios.append(ratio.detach())
            if len(ratios) * batch >= pairs:
                return torch.cat(ratios)
            grads = torch.autograd.grad(ratio.log().sum(), (x, y))
            length = 0.1 * norm((x - y).detach()).view(-1, 1, 1)
            x, y = (
                within(at.detach() + length * grad / norm(grad).view(-1, 1, 1).clamp_min(1e-30), 1.0)
                for at, grad in zip((x, y), grads, strict=True)
            )


def run(rows, name, limit, method, text, options, seed):
    """Train one model, and attack it."""
    letters = sorted(set(text))
    number = {letter: i for i, letter in enumerate(letters)}
    data = torch.tensor([number[letter] for letter in text])
    cut = int(0.9 * len(data))
    torch.manual_seed(seed)
    model = Characters(len(letters), options.width, 4, options.blocks, options.window)
    generator, start = torch.Generator().manual_seed(seed), time.perf_counter()
    train(model, *method, data[:cut], options.steps, options.batch, options.window, generator)
    seconds = time.perf_counter() - start
    model.double().eval()
    with torch.no_grad():
        ids = sample(data[cut:], 64, options.window + 1, torch.Generator().manual_seed(1))
        logits = model(ids[:, :-1])
        loss = float(functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
        hits = float((logits.argmax(-1) == ids[:, 1:]).double().mean())
        radius = float(norm(model.rows(ids[:, :-1])).max())
    report = lipschitz_bound(model.network, radius=1.0)
    ratios = attack(model, data[:cut], options.pairs, 50, 40, min(options.window, 16), generator)
    bound = report.totals["bound"]
    rows.add(
        name=name,
        limit=limit,
        seed=seed,
        held_out_loss=loss,
        accuracy=hits,
        log10_bound=report.totals["log10"],
        temperature=float(model.temperature.detach().exp()),
        largest_norm=max(row["bound"] for row in report.rows if row["kind"] == "Linear"),
        input_norm=radius,
        pairs=len(ratios),
        worst_ratio=float(ratios.max()),
        passed=int((ratios > bound).sum()),
        training_seconds=seconds,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with tinyshakespeare; else the text is CPython's topics")
    parser.add_argument("--json", type=Path, default=Path("lipschitz.json"))
    parser.add_argument("--limits", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--methods", nargs="+", default=list(methods(1.0)))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a minute instead of a few hours")
    options = parser.parse_args()
    if options.smoke:
        options.limits, options.methods = [2.0], ["none", "soft cap", "hammer", "adam, soft cap"]
        options.steps, options.pairs, options.width, options.window = 40, 4000, 32, 16
    text = corpus(options.data)
    rows = Rows(options.json)
    for limit, name in itertools.product(options.limits, options.methods):
        limit = None if name == "none" else limit
        if not rows.has(name=name, limit=limit, seed=options.seed):
            run(rows, name, limit, methods(limit or 1.0)[name], text, options, options.seed)
    passed = sum(row["passed"] for row in rows.rows)
    print(f"{passed} of {sum(row['pairs'] for row in rows.rows)} pairs pass their certificate")
    raise SystemExit(passed > 0)


def corpus(folder):
    """Return Shakespeare's plays, or CPython's topics."""
    return read(Path(folder) / "tinyshakespeare" / "input.txt.xz") if folder else texts(None)["topics"]


if __name__ == "__main__":
    main()
