"""One of every kind of adapter, for the suites about kinds of layers."""

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
]
