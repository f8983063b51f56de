"""Orthonormal bases that change smoothly with what they are made of."""

import torch
from torch import Generator, Tensor


def orthonormal(values: Tensor) -> Tensor:
    """Return orthonormal columns (..., m, r) that span those of (..., m, r), m >= r.

    Column j is as near to column j as the ones before it allow, with its sign. Where columns depend on each
    other, some directions are arbitrary, but orthonormal all the same.

    >>> orthonormal(torch.tensor([[-2.0], [0.0]])).flatten().tolist()
    [-1.0, 0.0]
    """
    q, r = torch.linalg.qr(values)
    return q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)[..., None, :]


def power_steps(values: Tensor, basis: Tensor, steps: int) -> Tensor:
    """Return bases of the leading left singular vectors of (..., m, n), by block power steps from (..., m, r)."""
    largest = torch.linalg.vector_norm(values, torch.inf, dim=(-2, -1), keepdim=True)
    power = -torch.frexp(largest).exponent  # a power of two changes no digit, and squares do not overflow
    for _ in range(steps):
        inner = torch.ldexp(values.mT @ basis, power)
        basis = orthonormal(torch.ldexp(values @ inner, power))
    return basis


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right with the order of ``right`` in memory, so that what is transposed stays so."""
    return (right.mT @ left.mT).mT if right.stride(-2) == 1 else left @ right


def draw_normal(shape: tuple[int, ...], seeds: Tensor, like: Tensor) -> Tensor:
    """Return normal numbers (k, *shape), each part from its own seed of (k,), on the device of ``like``."""
    drawn = [torch.randn(shape, generator=seeded(seed)) for seed in seeds.tolist()]
    return torch.stack(drawn).to(like)


def seeded(*numbers: int, device: torch.device | str = "cpu") -> Generator:
    """Return a generator for whole numbers; different ones give unrelated sequences, as do kinds of devices."""
    seed = 0
    for number in numbers:  # the steps of splitmix64
        seed = (seed + number + 0x9E3779B97F4A7C15) % 2**64
        seed = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        seed = ((seed ^ (seed >> 27)) * 0x94D049BB133111EB) % 2**64
        seed ^= seed >> 31
    return Generator(device).manual_seed(seed % 2**63)
