"""What processes with parts of parameters check; see test_exchange.py."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from contracts.test_transforms import SETTINGS, SHAPES, parameters, through_a_file
from mixtures import MIXTURES
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from rankwise import Layerwise, Optimizer, Replicated, StochasticRounding
from rankwise.core.combining import chain
from rankwise.core.hidden import hidden_matrices
from rankwise.core.states import leaves
from rankwise.core.transforms import Transform
from rankwise.optimizers import adam, dct_adamw, frugal, galore, hard_cap, muon, oblique, sign, stiefel
from rankwise.projectors import Every

QUICK: dict[str, Transform] = {
    "adam": adam(),
    "chain": chain(adam(), hard_cap(limit=1.5)),
    "dct_adamw": dct_adamw(rank=2, every=3),
    "frugal": frugal(every=4),
    "galore": galore(rank=2, every=4),
    "muon": muon(),
    "oblique": oblique(),
    "sign": sign(),
    "stiefel": stiefel(),
}

SAVED = ("adam", "dct_adamw", "galore", "muon")


def quick() -> Mapping[str, Callable[[], None]]:
    one = {f"sharded {name}": functools.partial(as_one, each) for name, each in QUICK.items()}
    models = {f"model {name}": functools.partial(model, each) for name, each in QUICK.items() if name != "chain"}
    others = [bytes_are_few, columns, experts_are_found, not_finite, refused, resumed, states_are_shared_out]
    return one | models | {each.__name__: each for each in others}


def every() -> Mapping[str, Callable[[], None]]:
    one = {
        f"sharded {name} {i}": functools.partial(as_one, each)
        for name, all_ in SETTINGS.items()
        for i, each in enumerate(all_)
    }
    return one


def four() -> Mapping[str, Callable[[], None]]:
    ways = {"one way": as_one, "two ways": in_two_ways}
    return {
        f"in {way} {name}": functools.partial(check, each)
        for way, check in ways.items()
        for name, each in QUICK.items()
    }


def spread(values: Tensor, mesh: Any = None, *placements: Any) -> DTensor:
    """By rows over all processes, if nothing else is said; a scalar is everywhere."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    return distribute_tensor(values, mesh, placements or ([Shard(0)] if values.ndim else [Replicate()]))


def drawn(shapes: Any, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def pair(transform: Transform, shapes: Any, *layout: Any, **options: Any) -> tuple[Optimizer, Optimizer]:
    one = parameters(shapes=shapes)
    mine = [nn.Parameter(spread(p.detach(), *layout)) for p in one]
    first, second = (Optimizer([(each, transform)], lr=0.05, weight_decay=0.1, **options) for each in (one, mine))
    return first, second


def params(optimizer: Optimizer) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def step(one: Optimizer, two: Optimizer, number: int, *layout: Any) -> None:
    for p, q, grad in zip(params(one), params(two), drawn([p.shape for p in params(one)], number), strict=True):
        p.grad, q.grad = grad, spread(grad, *layout)
    one.step()
    two.step()


def same(one: Optimizer, two: Optimizer) -> None:
    for p, q in zip(params(one), params(two), strict=True):
        torch.testing.assert_close(p.detach(), q.detach().full_tensor(), rtol=1e-8, atol=1e-9)


def as_one(transform: Transform, shapes: Any = SHAPES, *layout: Any) -> None:
    """Also with fewer rows than processes, and after a state went through a file."""
    one, two = pair(transform, shapes, *layout)
    for number in range(5):
        step(one, two, number, *layout)
    three = Optimizer([(params(two), transform)], lr=0.05, weight_decay=0.1)
    three.load_state_dict(through_a_file(two))
    for number in range(5, 8):
        step(one, three, number, *layout)
    same(one, three)


def columns() -> None:
    for transform in QUICK.values():
        as_one(transform, [(6, 9), (9, 5), (5, 3, 2, 2)], init_device_mesh("cpu", (2,)), Shard(1))


def in_two_ways(transform: Transform) -> None:
    """Replicated and sharded at once, and by rows and columns."""
    mesh = init_device_mesh("cpu", (2, 2))
    for placements in ([Replicate(), Shard(0)], [Shard(0), Shard(1)], [Replicate(), Replicate()]):
        as_one(transform, [(6, 9), (9, 6), (7, 5)], mesh, *placements)


def small(transform: Transform, *, sharded: bool) -> tuple[nn.Module, Optimizer]:
    """A model whose sides do not divide by the number of processes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(13, 17), nn.Tanh(), nn.Linear(17, 9)).double()
    for layer in (net[0], net[2], net) if sharded else ():
        fully_shard(layer)
    return net, Optimizer([(net.named_parameters(), transform)], lr=0.02)


def learn(net: nn.Module, optimizer: Optimizer, steps: range, rank: int | None = None) -> None:
    """Steps on one of two batches, or on both."""
    for number in steps:
        (both,) = drawn([(2, 5, 13)], number)
        net(both.flatten(0, 1) if rank is None else both[rank]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def model(transform: Transform) -> None:
    """FSDP2 on parts of a batch is one process on all of it."""
    (one, first), (two, second) = (small(transform, sharded=sharded) for sharded in (False, True))
    learn(one, first, range(6))
    learn(two, second, range(6), dist.get_rank())
    same(first, second)


def experts_are_found() -> None:
    """Also where they are sharded as modules of their own."""
    for name in ("mixtral", "gpt-oss"):
        net = MIXTURES[name]()
        before = hidden_matrices(net)
        for layer in net.model.layers:
            fully_shard(layer.mlp.experts)
            fully_shard(layer)
        fully_shard(net)
        assert hidden_matrices(net) == before


def saving(folder: Path) -> Mapping[str, Callable[[], None]]:
    return {f"saved {name}": functools.partial(save, folder, name) for name in SAVED}


def save(folder: Path, name: str) -> None:
    """In torch's two ways: in shards, and as a whole."""
    net, optimizer = small(QUICK[name], sharded=True)
    learn(net, optimizer, range(5), dist.get_rank())
    checkpoint.save(
        {"model": state.get_model_state_dict(net), "optimizer": state.get_optimizer_state_dict(net, optimizer)},
        checkpoint_id=folder / name,
    )
    whole = state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    kept = [
        state.get_model_state_dict(net, options=whole),
        state.get_optimizer_state_dict(net, optimizer, options=whole),
    ]
    if dist.get_rank() == 0:
        torch.save(kept, folder / f"{name}.pt")


def loaded(folder: Path, name: str, *, whole: bool) -> tuple[nn.Module, Optimizer]:
    """What was saved, in this process alone."""
    net, optimizer = small(QUICK[name], sharded=False)
    if whole:
        weights, moments = torch.load(folder / f"{name}.pt", weights_only=True)
    else:
        weights, moments = state.get_model_state_dict(net), state.get_optimizer_state_dict(net, optimizer)
        checkpoint.load({"model": weights, "optimizer": moments}, checkpoint_id=folder / name, no_dist=True)
    net.load_state_dict(weights)
    state.set_optimizer_state_dict(net, optimizer, moments)
    return net, optimizer


def bytes_are_few() -> None:
    """Elementwise steps exchange nothing; projected ones what is projected, but where a basis is due."""
    shapes, whole = [(32, 48), (48, 32), (7,)], 2 * 32 * 48 * 8
    one, two = pair(galore(rank=4, every=Every(3, together=True)), shapes)
    for number in range(6):
        step(one, two, number)
        assert two.traffic() == (whole if number in (0, 3) else whole * 4 // 32)
    same(one, two)
    for transform, expected in ((adam(), 0), (muon(), whole)):
        one, two = pair(transform, shapes)
        step(one, two, 0)
        assert two.traffic() == expected


def not_finite() -> None:
    """All processes say so, and nothing has changed."""
    one, two = pair(galore(rank=2), [(6, 9), (7,)])
    step(one, two, 0)
    before = [p.detach().full_tensor().clone() for p in params(two)]
    for p, grad in zip(params(two), drawn([p.shape for p in params(two)], 1), strict=True):
        p.grad = spread(grad)
    params(two)[1].grad.to_local()[0] = float("nan") if dist.get_rank() else 1.0
    where = "parameter 1 of shape" if dist.get_rank() else "a parameter in another process"
    with pytest.raises(FloatingPointError, match=where):
        two.step()
    for p, value in zip(params(two), before, strict=True):
        torch.testing.assert_close(p.detach().full_tensor(), value, rtol=0, atol=0)


def refused() -> None:
    mesh = init_device_mesh("cpu", (2,))
    partial = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]))
    with pytest.raises(ValueError, match="redistribute"):
        Optimizer([([partial], adam())], lr=0.1)
    weight = nn.Parameter(spread(torch.ones(4, 6)))
    with pytest.raises(ValueError, match="rounded to nearest"):
        Optimizer([([weight], adam())], lr=0.1, write=StochasticRounding())
    optimizer = Optimizer([([weight], adam())], lr=0.1)
    for make in (Layerwise, Replicated):
        with pytest.raises(ValueError, match=r"one process|sharded"):
            make(optimizer)


def resumed() -> None:
    """From a state that is whole; not from one of another number of processes, nor in one process from shards."""
    for transform in (adam(), galore(rank=2, every=4)):
        one, two = pair(transform, [(7, 9), (7,)])
        for number in range(3):
            step(one, two, number)
        three = Optimizer([(params(two), transform)], lr=0.05, weight_decay=0.1)
        three.load_state_dict(one.state_dict())
        step(one, three, 3)
        same(one, three)
    saved = three.state_dict()
    with pytest.raises(ValueError, match="saved in shards"):
        one.load_state_dict(saved)
    mesh = init_device_mesh("cpu", (2, 1))
    other = Optimizer(
        [([nn.Parameter(spread(p, mesh, Shard(0), Shard(0))) for p in params(one)], transform)], lr=1
    )
    with pytest.raises(ValueError, match=r"saved by 2 processes as .*torch\.distributed\.checkpoint"):
        other.load_state_dict(saved)
    short = one.state_dict()
    short["state"][1]["mean"] = short["state"][1]["mean"][:4]
    with pytest.raises(ValueError, match="shape"):
        three.load_state_dict(short)


def states_are_shared_out() -> None:
    """Measured and predicted: a half for Adam on even sides, beside counters; the same for what is whole."""
    for transform, share in ((adam(), 0.5), (muon(), 1.0)):
        one, two = pair(transform, [(32, 48)])
        step(one, two, 0)
        kept = [sum(leaf.nbytes for leaf in leaves(o.state[params(o)[0]])) for o in (one, two)]
        assert kept == [one.state_bytes(), two.state_bytes()]
        assert kept[1] == pytest.approx(share * kept[0], rel=1e-3)
