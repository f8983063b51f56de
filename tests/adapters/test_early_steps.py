"""What papers claim of the first steps, on regressions with a known target, every rate tuned alike."""

import torch
from contracts.examples import draw
from contracts.problems import fill
from torch import Generator, Tensor

from rankwise.adapters import Lora, Pissa, Svfit
from rankwise.core.methods import Adapter
from rankwise.initialisers import GradientSvd
from rankwise.matrices import Base, Dense

SIZE, RANK, STEPS, RATES = 32, 4, 10, (0.003, 0.01, 0.03, 0.1, 0.3)


def weight(seed: int) -> Tensor:
    return draw(SIZE, SIZE, seed=seed) / SIZE**0.5


def rescaled(seed: int) -> Tensor:
    """The change of a weight whose largest singular values, as many as the rank, become half as large again."""
    u, s, vt = torch.linalg.svd(weight(seed))
    return 0.5 * u[:, :RANK] * s[:RANK] @ vt[:RANK]


def remaining(method: Adapter, change: Tensor, seed: int) -> float:
    """The share of the loss that is left after some steps of Adam at the best rate."""
    start, x = weight(seed), draw(256, SIZE, seed=seed + 20)
    y, found = x @ (start + change).mT, []
    for rate in RATES:
        stats = fill(method.needs, x, x @ start.mT - y)
        matrix = method.attach(Base(Dense(start.clone())), stats, Generator().manual_seed(seed)).double()
        optimizer = torch.optim.Adam([p for p in matrix.parameters() if p.requires_grad], lr=rate)
        for _ in range(STEPS):
            optimizer.zero_grad()
            (matrix(x) - y).square().mean().backward()
            optimizer.step()
        found.append(float((matrix(x) - y).detach().square().mean()))
    return min(found) / float((x @ change.mT).square().mean())


def test_a_start_at_the_gradient_leads():
    """LoRA-GA's claim, on a target without structure."""
    for seed in range(3):
        change = 0.5 * weight(seed + 10)
        ours = remaining(Lora(rank=RANK, start=GradientSvd()), change, seed)
        assert ours < 0.95 * remaining(Lora(rank=RANK), change, seed)


def test_pissa_leads_where_the_leading_directions_are_to_change():
    """And not on a target without structure: the lead is in the data, not in the method."""
    for seed in range(3):
        assert remaining(Pissa(rank=RANK), rescaled(seed), seed) < 0.9 * remaining(
            Lora(rank=RANK), rescaled(seed), seed
        )
        change = 0.5 * weight(seed + 10)
        assert remaining(Pissa(rank=RANK), change, seed) > remaining(Lora(rank=RANK), change, seed)


def test_svfit_needs_few_numbers_for_a_new_spectrum_and_fails_without_one():
    for seed in range(3):
        method = Svfit(rank=SIZE)  # an eighth of LoRA's numbers
        assert remaining(method, rescaled(seed), seed) < 0.2 * remaining(Lora(rank=RANK), rescaled(seed), seed)
        assert remaining(method, 0.5 * weight(seed + 10), seed) > 0.9
