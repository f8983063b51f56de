"""One of every kind of adapter, for the suites about kinds of layers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import rankwise
from rankwise import adapters
from rankwise.core.methods import Adapter
from rankwise.initialisers import GradientSvd, SingularVectors

METHODS: list[Adapter] = [
    adapters.Lora(rank=2),
    adapters.Lora(rank=2, magnitudes=True),
    adapters.Lora(rank=2, magnitudes=True, start=SingularVectors()),
    adapters.Lora(rank=2, start=SingularVectors()),
    adapters.Lora(rank=2, start=GradientSvd()),
    adapters.Eva(rank=2),
    adapters.GradNormLorp(rank=2, dropout=0.0, constant=False),
    adapters.Miss(rank=4),
    adapters.Bat(block=2),
    adapters.Svfit(rank=3),
    adapters.Loldu(rank=3),
    adapters.AdaLora(rank=3, target=2),
    adapters.FactorLora(rank=2),
    adapters.Householder(rank=4),
    adapters.KronLora(count=2, rank=2),
    adapters.Lamda(rank=2),
    adapters.Snella(rank=4),
    adapters.Snella(rank=4, density=0.9, target=0.5),
    adapters.Sst(rank=2),
    adapters.Tera(),
]


def kind(method: Adapter) -> str:
    """A name for tests: what methods say of themselves has addresses of functions, other ones in each process."""
    return type(method).__name__


def train(model: nn.Module, loss: Callable[[], Tensor], lr: float, steps: int) -> list[float]:
    """Take steps with what trains, as the schedules of its adapters ask, and return the losses before each."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    follower, losses = rankwise.follow(model, optimizer, steps=steps), []
    for _ in range(steps):
        optimizer.zero_grad()
        now = loss()
        now.backward()
        optimizer.step()
        losses.append(float(now.detach()))
    follower.stop()
    return losses
