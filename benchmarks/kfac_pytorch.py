"""Are the directions of K-FAC those of kfac-pytorch (https://github.com/gpauloski/kfac-pytorch), layer by layer?

Once with its factors' scale and damping translated exactly, where cosines should be one, and once with both
packages' own averages over some steps and dampings on a grid, where they differ by what scales and the start at
the identity do.

    python benchmarks/kfac_pytorch.py --json benchmarks/results/kfac_pytorch.json
"""

import argparse
import itertools
import warnings
from pathlib import Path

import torch
from common import Rows
from kfac.preconditioner import KFACPreconditioner
from torch import Tensor, nn
from torch.nn import functional

import rankwise
from rankwise.linalg import Jointly, Separately, both
from rankwise.preconditioners import Kfac

SAMPLES = 32


def network() -> nn.Module:
    """Convolutions whose every position reaches the loss, and two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 12, 3, stride=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(108, 24),
        nn.Tanh(),
        nn.Linear(24, 10),
    )


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Images with unequal pixels, and labels."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(count, SAMPLES, 3, 8, 8, generator=rng) * torch.rand(3, 8, 8, generator=rng) * 2
    return [*zip(x, torch.randint(0, 10, (count, SAMPLES), generator=rng), strict=True)]


def directions(make, steps: int) -> dict[str, Tensor]:
    """Feed some batches, without moving the weights; return what the last gradient became, by layer."""
    model = network()
    step = make(model)
    for x, y in batches(steps):
        model.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        step()
    layers = {n: layer for n, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    return {n: torch.cat([p.grad.flatten() for p in layer.parameters()]) for n, layer in layers.items()}


def theirs(damping: float, decay: float, steps: int, method: str = "eigen") -> dict[str, Tensor]:
    """Directions of kfac-pytorch; its clip only shortens them, and must not be None."""
    options = {"damping": damping, "factor_decay": decay, "kl_clip": 1e30, "compute_method": method}
    return directions(lambda model: KFACPreconditioner(model, **options).step, steps)


def ours(method: Kfac, steps: int) -> dict[str, Tensor]:
    """Directions of rankwise."""
    return directions(lambda model: rankwise.precondition(model, method).step, steps)


def factors_of(layer: str) -> tuple[int, int]:
    """How many times larger A and G are here."""
    positions = {"0": 64, "2": 36}.get(layer, 1)
    return positions**2, SAMPLES**2 * positions**3


def factor(layer: str) -> int:
    """How many times larger the Fisher matrix is here."""
    inputs, outputs = factors_of(layer)
    return inputs * outputs


def main():
    """Write a cosine for each layer and setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True)
    warnings.filterwarnings("ignore", "Full backward hook is firing")  # theirs, on the first layer
    rows = Rows(Path(parser.parse_args().json))
    plain = directions(lambda model: lambda: None, 1)
    for damping, layer in itertools.product((1e-3, 1e-2, 1e-1), plain):
        mine = ours(Kfac(damping=damping, decay=0.0), 1)[layer]
        other = theirs(damping / factor(layer), 1e-30, 1)[layer]
        same = compare(mine, other, factor(layer))
        key = {"setting": "translated", "damping": damping, "layer": layer}
        rows.add(**key, **same, cosine_with_gradient=compare(mine, plain[layer], 1.0)["cosine"])
    for damping, layer in itertools.product((1e-6, 1e-4), plain):
        inputs, outputs = factors_of(layer)

        def share(a: Tensor, g: Tensor, value: float, inputs=inputs, outputs=outputs) -> tuple[float, float]:
            return value * inputs, value * outputs

        mine = ours(Kfac(damping=damping, decay=0.0, solver=Separately(share=share)), 1)[layer]
        other = theirs(damping, 1e-30, 1, "inverse")[layer]
        key = {"setting": "translated, inverse", "damping": damping, "layer": layer}
        rows.add(**key, **compare(mine, other, factor(layer)))
    for method, solver in (("eigen", Jointly()), ("inverse", Separately(share=both))):
        other = theirs(1e-3, 0.95, 30, method)
        for damping in (1e-3, 1e-1, 10.0):
            kfac = Kfac(damping=damping, every=1, solver=solver, identity_start=method == "inverse")
            for layer, mine in ours(kfac, 30).items():
                key = {"setting": f"defaults, {method}", "damping": damping, "layer": layer}
                rows.add(**key, **compare(mine, other[layer], 1.0))


def compare(mine: Tensor, other: Tensor, scale: float) -> dict[str, float]:
    """Cosine of two directions, and the ratio of their lengths, which ``scale`` would make one."""
    cosine = float(functional.cosine_similarity(mine.double(), other.double(), 0))
    return {"cosine": cosine, "length_ratio": float(mine.double().norm() / other.double().norm() * scale)}


if __name__ == "__main__":
    main()
