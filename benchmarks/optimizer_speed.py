"""What a projected optimiser costs beside galore-torch, in one interleaved run.

Parts: ``refresh``, the seconds to find a basis for a drifting gradient with a falling spectrum, and the share of
its energy that the basis holds, divided by the share that the SVD's basis holds; ``step``, the seconds of a step
between two refreshes on such matrices; ``stalls``, the longest step over the median one, on the layers of a small
Llama, with the very first step (which fits all bases, and makes all states) apart, each step the median of three
equal runs, since what else the machine does has no fixed step; ``compiled``, the seconds of such a layer's steps
with ``Optimizer(compiled=True)`` and without, beside torch's own AdamW, plain and fused.

galore-torch (``pip install --no-deps galore-torch``) imports bitsandbytes, which needs a GPU, for its 8-bit
optimiser; its own AdamW and projector are loaded here without that. Both keep float32 states.

    python benchmarks/optimizer_speed.py --json benchmarks/results/optimizer_speed.json
"""

import argparse
import importlib
import importlib.util
import statistics
import sys
import time
import types
from pathlib import Path

import torch
from common import Rows
from torch import nn

import rankwise
from rankwise.optimizers import adam, galore
from rankwise.projectors import Cosine, LargestRows, Randomised, RandomOrthogonal, WarmPower

BLOCK = {
    "q": (1, 1),
    "k": (1, 1),
    "v": (1, 1),
    "o": (1, 1),
    "gate": (2.6875, 1),
    "up": (2.6875, 1),
    "down": (1, 2.6875),
}
OURS = {
    "warm power": WarmPower(),
    "randomised": Randomised(),
    "cosine": Cosine(),
    "largest rows": LargestRows(),
    "random": RandomOrthogonal(),
}


def rival():
    """Return the AdamW and the projector of galore-torch, without its 8-bit optimiser."""
    found = importlib.util.find_spec("galore_torch")
    if found is None or found.submodule_search_locations is None:
        raise SystemExit("pip install --no-deps galore-torch")
    package = types.ModuleType("galore_torch")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["galore_torch"] = package
    adamw = importlib.import_module("galore_torch.adamw")
    return adamw.AdamW, importlib.import_module("galore_torch.galore_projector").GaLoreProjector


class Gradients:
    """Gradients whose singular values fall like i^-power, and whose left vectors turn from one to the next."""

    def __init__(self, m, n, seed, power=1.0, noise=0.02):
        self.generator = torch.Generator().manual_seed(seed)
        self.inside = min(m, n) // 2
        self.left, self.right = self.draw(m, self.inside), self.draw(self.inside, n)
        self.values = torch.arange(1, self.inside + 1) ** -power
        self.noise = noise * float(self.values.square().mean().sqrt())

    def draw(self, *shape):
        """Normal numbers."""
        return torch.randn(*shape, generator=self.generator)

    def next(self, turn=0.1):
        """Return the next one, after turning the left vectors."""
        self.left = (1 - turn**2) ** 0.5 * self.left + turn * self.draw(*self.left.shape)
        grad = (self.left * self.values) @ self.right
        return grad.add_(self.draw(*grad.shape), alpha=self.noise * self.inside**0.5)


def timed(function):
    """Return the seconds of a call, and its result."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def refresh(rows, projector_of_rival, m, n, rank, power, rounds):
    """Time fits, taking turns, and measure the shares of energy."""
    gradients, states = Gradients(m, n, 0, power), {}
    seconds, shares = {}, {}
    for i in range(rounds + 1):
        grad = gradients.next()
        theirs = projector_of_rival(rank, update_proj_gap=1)
        taken, low = timed(lambda theirs=theirs, grad=grad: theirs.project(grad, 0))
        best = float(low.square().sum() / grad.square().sum())
        if i:
            seconds.setdefault("galore-torch", []).append(taken)
            shares.setdefault("galore-torch", []).append(best)
        for name, projector in OURS.items():
            wide = grad[None] if m <= n else grad.mT[None]
            state = states.get(name) or projector.init(wide, rank, torch.tensor([0]))

            def fit(projector=projector, wide=wide, state=state, first=i == 0):
                fitted = projector.fit(wide, state, first=first)
                return fitted, projector.down(wide, fitted)

            taken, (states[name], low) = timed(fit)
            if i:
                seconds.setdefault(name, []).append(taken)
                shares.setdefault(name, []).append(float(low.square().sum() / grad.square().sum()))
    base = statistics.median(seconds["galore-torch"])
    case = {"m": m, "n": n, "rank": rank, "power": power, "rounds": rounds}
    for name, each in seconds.items():
        held = statistics.mean(a / b for a, b in zip(shares[name], shares["galore-torch"], strict=True))
        about = {"seconds": statistics.median(each), "ratio": statistics.median(each) / base}
        share = statistics.mean(shares[name])
        rows.add(part="refresh", optimizer=name, **case, **about, share=share, of_svd=held)


def pair(adamw, shapes, rank, every):
    """Return both optimisers by name, each with parameters and gradients of its own."""
    made = {}
    for name in ("galore-torch", "rankwise"):
        params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        for i, p in enumerate(params):
            p.grad = Gradients(*p.shape, seed=i).next()
        if name == "rankwise":
            made[name] = rankwise.Optimizer([(params, galore(rank=rank, every=every))], lr=1e-3)
        else:
            options = {"rank": rank, "update_proj_gap": every, "scale": 0.25, "proj_type": "std"}
            made[name] = adamw([{"params": params, **options}], lr=1e-3, no_deprecation_warning=True)
    return made


def steps(rows, adamw, part, shapes, rank, every, count, runs=1):
    """Time steps, taking turns; of several equal runs each step counts as its median one."""
    seen = {}
    for _ in range(runs):
        optimizers = pair(adamw, shapes, rank, every)
        for name in optimizers:
            seen.setdefault(name, []).append([])
        for _ in range(count):
            for name, optimizer in optimizers.items():
                seen[name][-1].append(timed(optimizer.step)[0])
    seconds = {name: [statistics.median(s) for s in zip(*found, strict=True)] for name, found in seen.items()}
    base = statistics.median(seconds["galore-torch"][1:])
    for name, (first, *others) in seconds.items():
        median = statistics.median(others)
        case = {"matrices": len(shapes), "rank": rank, "every": every, "steps": count, "runs": runs}
        figures = {"first": first, "median": median, "ratio": median / base}
        figures["max_over_median"] = max(others) / median
        rows.add(part=part, optimizer=name, **case, **figures, mean=statistics.mean(others))


def compiled(rows, shapes, rank, count):
    """Time steps of the same parameters, taking turns; the first ones, which compile, are left out."""

    def given():
        params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        for i, p in enumerate(params):
            p.grad = Gradients(*p.shape, seed=i).next()
        return params

    def ours(transform, on):
        return rankwise.Optimizer([(given(), transform)], lr=1e-3, compiled=on)

    made = {
        "torch AdamW": torch.optim.AdamW(given(), lr=1e-3),
        "torch AdamW, fused": torch.optim.AdamW(given(), lr=1e-3, fused=True),
        "rankwise AdamW": ours(adam(), False),
        "rankwise AdamW, compiled": ours(adam(), True),
        "rankwise GaLore": ours(galore(rank=rank, every=10**6), False),
        "rankwise GaLore, compiled": ours(galore(rank=rank, every=10**6), True),
    }
    seconds = {}
    for _ in range(count):
        for name, optimizer in made.items():
            seconds.setdefault(name, []).append(timed(optimizer.step)[0])
    base = statistics.median(seconds["torch AdamW"][3:])
    for name, each in seconds.items():
        median = statistics.median(each[3:])
        about = {"matrices": len(shapes), "rank": rank, "steps": count, "first": each[0]}
        rows.add(part="compiled", optimizer=name, **about, median=median, ratio=median / base)


def main():
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="the result; an existing one is continued")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--smoke", action="store_true", help="small matrices and few steps, to see that it runs")
    options = parser.parse_args()
    rows, (adamw, projector) = Rows(Path(options.json)), rival()
    m, n, rank, width, blocks = (96, 160, 16, 32, 1) if options.smoke else (2048, 5504, 256, 512, 6)
    rounds, count = (2, 6) if options.smoke else (options.rounds, options.steps)
    layers = [tuple(int(width * side) for side in BLOCK[name]) for _ in range(blocks) for name in BLOCK]
    for power in (1.0, 0.5):
        if not rows.has(part="refresh", power=power):
            refresh(rows, projector, m, n, rank, power, rounds)
    if not rows.has(part="step"):
        steps(rows, adamw, "step", [(m, n), (n, m), (m, m)], rank, 10**6, 5 * rounds)
    if not rows.has(part="stalls"):
        runs = 1 if options.smoke else 3
        steps(rows, adamw, "stalls", layers, width // 4, max(2, count // 2), count, runs=runs)
    if not rows.has(part="compiled"):
        compiled(rows, [(m, n), (n, m), (m, m)], rank, 5 * rounds)


if __name__ == "__main__":
    with torch.no_grad():
        main()
