"""What processes with replicas of parameters check; see test_exchange.py."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from contracts.examples import draw
from contracts.test_transforms import SETTINGS, parameters
from torch import nn
from torch.distributed.fsdp import fully_shard

import rankwise
from rankwise import IntegerWeights, Optimizer, Replicated, StochasticRounding
from rankwise.core.combining import chain
from rankwise.core.fingerprint import digest_of
from rankwise.core.methods import Course
from rankwise.core.preconditioner import Preconditioner
from rankwise.core.states import leaves
from rankwise.core.transforms import Transform
from rankwise.linalg import expanded
from rankwise.matrices import Spectral
from rankwise.optimizers import adam, dct_adamw, frugal, galore, hard_cap, muon, project, quantised
from rankwise.preconditioners import Kfac, Sngd
from rankwise.projectors import EnergyDrop, Every, LargestRows
from rankwise.schedules import SampledVectors

QUICK: dict[str, Transform] = {
    "adam": adam(),
    "dct_adamw": dct_adamw(rank=2, every=3),
    "frugal": frugal(every=4),
    "galore": galore(rank=2, every=4),
    "looked at": galore(rank=2, every=EnergyDrop(steps=2, below=0.99)),
    "muon": muon(),
}


def quick() -> Mapping[str, Callable[[], None]]:
    others = [bytes_are_few, half_precision, missing, not_finite, other_states, refused, the_first_decides, whole]
    others += [
        composed_bytes_are_few,
        decompositions,
        first_of_any_layout,
        frozen_in_turns,
        integers,
        other_settings,
        scalers,
        sparse_in_one,
    ]
    return {**joint(), **{each.__name__: each for each in others}}


def joint() -> Mapping[str, Callable[[], None]]:
    return {f"joint {name}": functools.partial(joint_batch, each) for name, each in QUICK.items()}


def every() -> Mapping[str, Callable[[], None]]:
    return {
        f"joint {name} {i}": functools.partial(joint_batch, each)
        for name, all_ in SETTINGS.items()
        for i, each in enumerate(all_)
    }


RUNS: dict[str, tuple[float | None, Preconditioner | None]] = {
    "plain": (None, None),
    "clipped": (0.05, None),
    "natural": (None, Kfac(damping=0.1, every=2, early=2)),
    "natural, clipped": (0.05, Sngd(damping=0.1, every=2, sharing=expanded)),
}


def training(folder: Path) -> Mapping[str, Callable[[], None]]:
    return {name: functools.partial(stopped, folder, name) for name in RUNS}


def runs(folder: Path) -> Mapping[str, Callable[[], None]]:
    """Quick checks of whole runs."""
    return {"alone": functools.partial(alone, folder), "idle": idle, "sharded": sharded}


def alone(folder: Path) -> None:
    """A run that knows one process is refused before anything is written."""
    net = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16))
    place = folder / f"of {dist.get_rank()}"
    with pytest.raises(ValueError, match=r"DistributedDataParallel.* rankwise\.follow"):
        rankwise.finetune(net, torch.arange(4000) % 16, steps=1, window=20, checkpoint=place)
    assert not place.exists()


def idle() -> None:
    """A process would have nothing to do."""
    with pytest.raises(ValueError, match="2 processes share the batches of a step, but there are 1"):
        task("plain", None, accumulate=1)


def sharded() -> None:
    net = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16))
    fully_shard(net)
    optimizer = Optimizer([(net.parameters(), adam())], lr=0.05)
    with pytest.raises(ValueError, match=r"fully_shard.* write the loop"):
        rankwise.train(net, torch.arange(4000) % 16, optimizer, window=20, accumulate=2)


def task(name: str, folder: Path | None, **more: Any) -> nn.Module:
    """A small run, the same in any number of processes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 16)).double()
    optimizer = Optimizer(rankwise.parameter_groups(net, galore(rank=2, every=4)), lr=0.05)
    sizes: dict[str, Any] = {"window": 20, "rows": 2, "steps": 9, "accumulate": 3, "every": 3, **more}
    data, (clip, method) = torch.arange(4000).square() % 16, RUNS[name]
    handle = None if method is None else rankwise.precondition(net, method)
    rankwise.train(net, data, optimizer, clip=clip, precondition=handle, checkpoint=folder, **sizes)
    return net


def stopped(folder: Path, name: str) -> None:
    """Stops after the checkpoint at step 6; one process computes more of each step than the other."""

    def observe(step: int, _: Any) -> None:
        if step == 8:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        task(name, folder / name, observe=observe)


def gradients(params: list[nn.Parameter], step: int) -> list[list[torch.Tensor]]:
    """Those of each process."""
    generator = torch.Generator().manual_seed(step)
    return [
        [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in params]
        for _ in range(dist.get_world_size())
    ]


def give(params: list[nn.Parameter], values: Any) -> None:
    for p, value in zip(params, values, strict=True):
        p.grad = value.clone()


def alike(optimizer: Optimizer) -> None:
    """All processes have the same bits, in parameters and states."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [leaf for p in params for leaf in leaves(optimizer.state[p])]
    mine = digest_of({str(i): each for i, each in enumerate([*params, *kept])})
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    assert len(set(found)) == 1


def joint_batch(transform: Transform) -> None:
    """Steps are those of one process on the mean of all gradients."""
    one, mine = parameters(), parameters()
    whole = Optimizer([(one, transform)], lr=0.05, weight_decay=0.1)
    optimizer = Optimizer([(mine, transform)], lr=0.05, weight_decay=0.1)
    with Replicated(optimizer):
        for step in range(7):
            found = gradients(one, step)
            give(one, [torch.stack(each).mean(0) for each in zip(*found, strict=True)])
            give(mine, found[dist.get_rank()])
            whole.step()
            optimizer.step()
    for p, q in zip(one, mine, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-9)
    alike(optimizer)


def bytes_are_few() -> None:
    """In steady steps r / min(m, n) of the gradient, whatever is the longer side; and the steps are close."""
    shapes = [(32, 48), (48, 32), (32, 32)]
    one, mine = parameters(shapes=shapes), parameters(shapes=shapes)
    transform = galore(rank=4, every=Every(4, together=True))
    whole, optimizer = Optimizer([(one, transform)], lr=0.05), Optimizer([(mine, transform)], lr=0.05)
    replicas = Replicated(optimizer)
    shares = []
    for step in range(6):
        found = gradients(one, step)
        give(one, [torch.stack(each).mean(0) for each in zip(*found, strict=True)])
        give(mine, found[dist.get_rank()])
        whole.step()
        optimizer.step()
        shares.append(replicas.traffic()["last"] / replicas.traffic()["whole"])
    assert replicas.traffic()["whole"] == sum(p.nbytes for p in one)
    for step, share in enumerate(shares):
        assert 1.0 <= share < 1.01 if step in (0, 4) else 4 / 32 <= share <= 1.2 * 4 / 32
    for p, q in zip(one, mine, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def composed_bytes_are_few() -> None:
    """Also where a projection stands in few bits, or first in a chain; and the steps are those of one process."""
    shapes, inner = [(32, 48), (48, 32)], galore(rank=4, every=Every(4, together=True))
    for transform in (quantised(inner, least=1), chain(inner, hard_cap(limit=2.0))):
        one, mine = parameters(shapes=shapes), parameters(shapes=shapes)
        whole, optimizer = Optimizer([(one, transform)], lr=0.05), Optimizer([(mine, transform)], lr=0.05)
        with Replicated(optimizer) as replicas:
            for step in range(6):
                found = gradients(one, step)
                give(one, [torch.stack(each).mean(0) for each in zip(*found, strict=True)])
                give(mine, found[dist.get_rank()])
                whole.step()
                optimizer.step()
                share = replicas.traffic()["last"] / replicas.traffic()["whole"]
                assert share == pytest.approx(1.0 if step in (0, 4) else 4 / 32, rel=0.02)
        for p, q in zip(one, mine, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-9)
        alike(optimizer)


def half_precision() -> None:
    """What is exchanged has the type of gradients; rounding at random is the same everywhere."""
    mine = parameters(torch.bfloat16, [(32, 48), (7,)])
    optimizer = Optimizer([(mine, galore(rank=4))], lr=0.05, write=StochasticRounding())
    replicas = Replicated(optimizer)
    for step in range(3):
        give(mine, gradients(mine, step)[dist.get_rank()])
        optimizer.step()
    assert replicas.traffic()["last"] == 2 * (4 * 48 + 7 + 2)
    alike(optimizer)


def missing() -> None:
    """A gradient that only some have counts as zero elsewhere; one that none has leaves its parameter alone."""
    for transform in QUICK.values():
        one, mine = parameters(), parameters()
        whole, optimizer = Optimizer([(one, transform)], lr=0.05), Optimizer([(mine, transform)], lr=0.05)
        with Replicated(optimizer):
            for step in range(4):
                found = gradients(one, step)
                give(one, [each / dist.get_world_size() for each in found[0]])
                give(mine, found[0])
                one[0].grad = mine[0].grad = None
                if dist.get_rank():
                    for p in mine:
                        p.grad = None
                whole.step()
                optimizer.step()
        assert torch.equal(mine[0], parameters()[0])
        for p, q in zip(one, mine, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


def not_finite() -> None:
    """All processes say so, where a gradient is not, also where its projection is, or where the sum is not."""
    mine = parameters()
    rows = project(LargestRows(), adam(), rank=2, every=100)
    optimizer = Optimizer([(mine, rows)], lr=0.05)
    with Replicated(optimizer):
        for step in range(7):
            give(mine, gradients(mine, step)[dist.get_rank()])
            if step:
                before = [p.detach().clone() for p in mine]
                values = mine[3].grad
                assert values is not None
                if dist.get_rank() == 1:
                    values[0, step - 1] = float("nan" if step % 2 else "inf")  # most rows are not chosen
                with pytest.raises(FloatingPointError, match=r"parameter 3 of shape .* nothing was changed"):
                    optimizer.step()
                for p, q in zip(mine, before, strict=True):
                    torch.testing.assert_close(p.detach(), q, rtol=0, atol=0)
            else:
                optimizer.step()
    large = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    optimizer = Optimizer([([large], adam())], lr=0.05)
    with Replicated(optimizer):
        large.grad = torch.full_like(large, 5e4)
        with pytest.raises(FloatingPointError, match="their sum"):
            optimizer.step()


def other_states() -> None:
    """A state that only one process has loaded is found before the step."""
    mine = parameters(shapes=[(6, 9)])
    optimizer, other = (Optimizer([(mine, galore(rank=2))], lr=0.05) for _ in range(2))
    with Replicated(optimizer):
        give(mine, gradients(mine, dist.get_rank())[0])
        if dist.get_rank() == 1:
            other.step()
        optimizer.load_state_dict(other.state_dict())
        with pytest.raises(ValueError, match="different optimisers or states"):
            optimizer.step()


def refused() -> None:
    with pytest.raises(TypeError, match=r"rankwise\.Optimizer"):
        Replicated(torch.optim.SGD(parameters()))  # type: ignore[arg-type]
    shapes = [(2, 3)] if dist.get_rank() else [(3, 2)]
    with pytest.raises(ValueError, match="different parameters"):
        Replicated(Optimizer([(parameters(shapes=shapes), adam())], lr=0.1))
    optimizer = Optimizer([(parameters(), adam())], lr=0.1)
    with Replicated(optimizer), pytest.raises(ValueError, match="not in a closure"):
        optimizer.step(lambda: 0.0)
    optimizer.step(lambda: 0.0)


def the_first_decides() -> None:
    """Parameters that are different, or added later, become those of the first process."""
    mine, later = parameters(shapes=[(6, 9)]), parameters(shapes=[(4, 4)])
    with torch.no_grad():
        for p in (*mine, *later):
            p += dist.get_rank()
    optimizer = Optimizer([(mine, adam())], lr=0.05)
    with Replicated(optimizer):
        optimizer.add_param_group((later, adam()))
        give([*mine, *later], gradients([*mine, *later], 0)[dist.get_rank()])
        optimizer.step()
    alike(optimizer)


def first_of_any_layout() -> None:
    """Numbers come by their places, not by their order in memory, and neighbours in memory stay."""
    mine = torch.arange(12.0).view(3, 4) + 100 * dist.get_rank()
    across = mine.clone() if dist.get_rank() else mine.mT.contiguous().mT
    for values in (mine.clone()[:, :2], across):
        kept = None if values._base is None else values._base.clone()
        param = nn.Parameter(values)
        with Replicated(Optimizer([([param], adam())], lr=0.05)):
            first = torch.arange(12.0).view(3, 4)[:, : values.shape[1]]
            torch.testing.assert_close(param.detach(), first, rtol=0, atol=0)
        if kept is not None and values.shape[1] == 2:
            assert values._base is not None
            assert torch.equal(values._base[:, 2:], kept[:, 2:])


def frozen_in_turns() -> None:
    """One parameter is frozen as another begins to train: as many are there, but others."""
    mine = parameters(shapes=[(6, 9), (6, 9)])
    mine[1].requires_grad_(False)
    optimizer = Optimizer([(mine, galore(rank=2))], lr=0.05)
    with Replicated(optimizer):
        for step in range(4):
            if step == 1:
                mine[0].requires_grad_(False)
                mine[1].requires_grad_(True)
            for p, value in zip(mine, gradients(mine, step)[dist.get_rank()], strict=True):
                p.grad = value if p.requires_grad else None
            optimizer.step()
    alike(optimizer)
    assert all(not torch.equal(p, q) for p, q in zip(mine, parameters(shapes=[(6, 9), (6, 9)]), strict=True))


def other_settings() -> None:
    """What would have them drift apart is found before the step: seeds of rounding, rates, frozen parameters."""
    rank = dist.get_rank()
    mine = parameters(torch.bfloat16, [(6, 9), (7,)])
    optimizer = Optimizer([(mine, adam())], lr=0.05, write=StochasticRounding(seed=rank))
    give(mine, gradients(mine, 0)[rank])
    with Replicated(optimizer), pytest.raises(ValueError, match="different optimisers"):
        optimizer.step()
    optimizer = Optimizer([(mine, adam())], lr=0.05)
    (group,) = optimizer.param_groups
    with Replicated(optimizer):
        give(mine, gradients(mine, 0)[rank])
        optimizer.step()
        before = [p.detach().clone() for p in mine]
        for name in ("lr", "weight_decay"):
            kept, group[name] = group[name], 0.1 * (rank + 1)
            give(mine, gradients(mine, 1)[rank])
            with pytest.raises(ValueError, match="different learning rates"):
                optimizer.step()
            group[name] = kept
        mine[rank % 2].requires_grad_(False)
        with pytest.raises(ValueError, match="frozen"):
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(mine, before, strict=True))
        mine[rank % 2].requires_grad_(True)
        optimizer.step()
    alike(optimizer)


def scalers() -> None:
    """Refused in all, also where only one has a gradient that is not finite; alone it may scale again."""
    (mine,) = parameters(torch.float32, [(6, 9)])
    optimizer = Optimizer([([mine], adam())], lr=0.05)
    with Replicated(optimizer):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(mine.sum() * (float("inf") if dist.get_rank() == 1 else 1.0)).backward()
        with pytest.raises(ValueError, match="GradScaler decides in each process alone"):
            scaler.step(optimizer)
        give([mine], gradients([mine], 0)[dist.get_rank()])
        optimizer.step()
    alike(optimizer)
    before = mine.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer.zero_grad()
    scaler.scale(mine.sum() * float("inf")).backward()
    scaler.step(optimizer)
    assert torch.equal(mine.detach(), before)


def sparse_in_one() -> None:
    """All processes refuse it."""
    net = nn.Embedding(5, 3)
    optimizer = Optimizer([(net.parameters(), adam())], lr=0.1)
    with Replicated(optimizer):
        net.sparse = dist.get_rank() == 1
        net(torch.tensor([1])).sum().backward()
        with pytest.raises(ValueError, match="sparse=False"):
            optimizer.step()


def decompositions() -> None:
    """Vectors of SST are those of the first process, whatever signs another one finds."""
    svd, sign = torch.linalg.svd, 1 - 2 * dist.get_rank()

    def turned(*args: Any, **options: Any) -> Any:
        u, s, vt = svd(*args, **options)
        return sign * u, s, sign * vt

    matrix = Spectral(*svd(draw(9, 6), full_matrices=False), torch.tensor([1, 4]))
    schedule = SampledVectors(hold=1)
    optimizer = torch.optim.SGD(matrix.parameters(), lr=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "svd", turned)
        schedule.settle(Course(schedule, {"": matrix}, optimizer, 9, done=3))
    torch.testing.assert_close(matrix.dense().detach(), draw(9, 6))
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, digest_of(matrix.state_dict()))
    assert len({*found}) == 1


def integers() -> None:
    """Weights that are kept as integers stay alike; they must begin so."""
    for other in (0, 1):
        torch.manual_seed(other * dist.get_rank())
        net = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 8))
        rankwise.train_as_integers(net, lambda name, _: name == "0")
        layer: Any = net[0]
        groups = [([p for p in net.parameters() if p.requires_grad], galore(rank=4))]
        optimizer = Optimizer(groups, lr=0.05, write=IntegerWeights(net))
        if other:
            with pytest.raises(ValueError, match="different integers"):
                Replicated(optimizer)
            continue
        before = layer.integers.dense().detach().clone()
        with Replicated(optimizer):
            for step in range(3):
                torch.manual_seed(2 * step + dist.get_rank())
                net(torch.randn(4, 64)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        alike(optimizer)
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, digest_of({"": layer.integers.dense().detach()}))
        assert len(set(found)) == 1
        assert not torch.equal(layer.integers.dense().detach(), before)


def whole() -> None:
    """Backward passes add up before the exchange, in the usual loop with a model."""
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6)).double()
    mine = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6)).double()
    mine.load_state_dict(one.state_dict())
    first, optimizer = (Optimizer([(m.parameters(), galore(rank=2, every=3))], lr=0.02) for m in (one, mine))
    schedules = [torch.optim.lr_scheduler.ExponentialLR(each, 0.9) for each in (first, optimizer)]
    world, rank = dist.get_world_size(), dist.get_rank()
    with Replicated(optimizer):
        for _ in range(6):
            batch = torch.randn(world * 2, 5, 12).double()  # the same in all
            one(batch.flatten(0, 1)).square().mean().backward()
            for part in batch[2 * rank : 2 * rank + 2]:
                (mine(part).square().mean() / 2).backward()
            for each, schedule in zip((first, optimizer), schedules, strict=True):
                each.step()
                schedule.step()
                each.zero_grad()
    for p, q in zip(one.parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)
    alike(optimizer)
