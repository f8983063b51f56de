"""Train a small network with natural gradients: two more lines in an ordinary loop, and fewer steps.

Both ways get the same learning rates to choose from. Run it as ``python examples/precondition.py``, or with
``--smoke`` on fewer numbers, in a few seconds.
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

import rankwise
from rankwise.preconditioners import Sngd

RATES = [0.03, 0.1, 0.3, 1.0]


def batches(inputs: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs, of which some are thirty times smaller than others and tell as much, and their labels."""
    rng = Generator().manual_seed(0)
    scales, truth = torch.logspace(0, -1.5, inputs), torch.randn(inputs, 4, generator=rng)
    while True:
        x = torch.randn(size, inputs, generator=rng)
        yield x * scales, (x @ truth).argmax(1)


def train(rate: float, steps: int, target: float, natural: bool, inputs: int, size: int) -> int:
    """Return after how many steps a running mean of the loss is below the target; ``steps`` if it never is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    handle = rankwise.precondition(model, Sngd(damping=0.1)) if natural else None  # the first line
    mean = 1.4
    for step, (x, y) in zip(range(steps), batches(inputs, size), strict=False):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        if handle is not None:
            handle.step()  # the second one
        optimizer.step()
        mean = 0.9 * mean + 0.1 * loss.item()
        if mean < target:
            return step + 1
    return steps


def main(smoke: bool, steps: int, target: float) -> tuple[int, int]:
    """Train with each learning rate in both ways; returns the fewest steps to the target without and with."""
    inputs, size = (16, 64) if smoke else (32, 128)
    found = []
    for natural in (False, True):
        taken = {rate: train(rate, steps, target, natural, inputs, size) for rate in RATES}
        print("natural gradients:" if natural else "plain gradients:  ", taken)
        found.append(min(taken.values()))
    print(f"steps to a loss of {target}: {found[0]} without, {found[1]} with preconditioning")
    return found[0], found[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a smaller network")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--target", type=float, default=0.8)
    given = parser.parse_args()
    main(given.smoke, given.steps, given.target)
