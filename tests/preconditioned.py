"""What several processes check together about preconditioning; see test_precondition_processes."""

import contextlib
import copy
import dataclasses
import datetime
import functools
import itertools
import os
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from naturals import gradient, natural
from torch import Generator, Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import rankwise
from rankwise.core.capture import Rows
from rankwise.core.conditioning import Conditioning
from rankwise.core.preconditioner import Curvature, Preconditioner, Shared
from rankwise.linalg import expanded
from rankwise.preconditioners import HyLo, Sngd

SECONDS = 60  # until a process that does not answer is given up
EACH = 4  # samples of a process


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moments(Preconditioner):
    """Running second moments of inputs and gradients, which are sums over processes; a small K-FAC."""

    damping: float = 0.3
    every: int = 2

    def captures(self, step: int) -> bool:
        return step % self.every == 0

    def local(
        self, rows: Sequence[Rows], curvature: Curvature, generator: Generator, samples: int, damping: float
    ) -> Shared:
        each = expanded(rows[0].each)
        x, g = each.inputs[:, 0], each.gradients[:, 0]
        return Shared(sums={"inputs": x.mT @ x, "gradients": g.mT @ g})

    def update(self, shared: Shared, samples: int, curvature: Curvature) -> None:
        for name, total in shared.sums.items():
            curvature[name] = 0.5 * curvature.get(name, torch.zeros_like(total)) + total / samples

    def invert(self, curvature: Curvature, damping: float, shapes: Sequence[tuple[int, int]]) -> Curvature:
        return {
            f"inverse.{name}": torch.linalg.inv(
                curvature[name] + damping * torch.eye(len(curvature[name])).double()
            )
            for name in ("inputs", "gradients")
        }

    def apply(self, gradients: Sequence[Tensor], curvature: Curvature, damping: float) -> list[Tensor]:
        return [curvature["inverse.gradients"] @ v @ curvature["inverse.inputs"] for v in gradients]

    def cost(self, shapes: Sequence[tuple[int, int]]) -> float:
        return float(sum(m**3 + n**3 for m, n in shapes))


METHODS: dict[str, Preconditioner] = {
    "moments": Moments(),
    "by layers": Sngd(damping=0.3, every=2),
    "together": Sngd(damping=0.3, every=2, together=True),
}


class Net(nn.Module):
    """A convolution, a layer that some samples may pass by, and one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.images, self.rare, self.out = nn.Conv2d(2, 3, 2), nn.Linear(12, 12), nn.Linear(12, 3, bias=False)
        self.double()

    def forward(self, x: Tensor, rare: Tensor | None = None, called: int | None = None) -> Tensor:
        """``rare`` weighs the second layer, which only the first ``called`` samples meet; None means all."""
        y = torch.tanh(self.images(x)).flatten(1)
        if rare is not None:
            met = rare[:called, None] * torch.tanh(self.rare(y[:called]))
            y = torch.cat([y[:called] + met, y[len(met) :]])
        return self.out(y)


def batch(step: int, size: int) -> tuple[Tensor, Tensor]:
    rng = Generator().manual_seed(step)
    return torch.randn(size, 2, 3, 3, generator=rng).double(), torch.randint(0, 3, (size,), generator=rng)


@dataclasses.dataclass
class Place:
    """This process among all, and a group of itself alone."""

    rank: int
    world: int
    alone: Any

    def own(self, *whole: Tensor) -> list[Tensor]:
        """The part of a joint batch that is this process's."""
        return [each.chunk(self.world)[self.rank] for each in whole]

    def average(self, model: nn.Module) -> None:
        """Average gradients in the plain way; who has none has zeros."""
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad)
            parameter.grad /= self.world


def train(
    model: nn.Module,
    handle: Conditioning,
    steps: Sequence[int],
    part: Callable[..., Sequence[Tensor]],
    world: int,
    called: nn.Module | None = None,
    average: Callable[[nn.Module], None] = lambda model: None,
) -> Tensor:
    """Train on parts of joint batches; returns all parameters as a vector."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    for step in steps:
        optimizer.zero_grad()
        x, y = part(*batch(step, EACH * world))
        functional.cross_entropy((called or model)(x, torch.ones(len(x)).double()), y).backward()
        average(model)
        assert handle.step()
        optimizer.step()
    return vector(model)


def vector(model: nn.Module) -> Tensor:
    parameters = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in parameters])


def joint(place: Place, method: Preconditioner, steps: Sequence[int]) -> Tensor:
    """What one process makes of the joint batches."""
    model = Net()
    return train(model, rankwise.precondition(model, method, group=place.alone), steps, lambda *a: a, place.world)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def everywhere(place: Place, value: Tensor) -> None:
    """A tensor has the same bits in all processes."""
    every = [torch.empty_like(value) for _ in range(place.world)]
    dist.all_gather(every, value)
    assert all(torch.equal(each, value) for each in every)


def joint_batch_with_ddp(place: Place) -> None:
    for method in METHODS.values():
        model = Net()
        called = DistributedDataParallel(model)
        handle = rankwise.precondition(called, method)
        assert [*handle.layers] == ["images", "rare", "out"]
        found = train(model, handle, range(4), place.own, place.world, called)
        close(found, joint(place, method, range(4)))
        everywhere(place, found)


def joint_batch_with_all_reduce_and_any_share_of_workers(place: Place) -> None:
    shares = {1 / place.world, min(0.5, 1.0), 1.0}
    for method in METHODS.values():
        found = []
        for workers in shares:
            model = Net()
            handle = rankwise.precondition(model, method, workers=workers)
            found.append(train(model, handle, range(4), place.own, place.world, average=place.average))
            everywhere(place, found[-1])
            width = max(1, round(workers * place.world))
            known = handle.curvatures
            mine = {block for block in known.blocks if known.multiplies(block)}
            assert known.inverted == mine
            if width == place.world:
                assert len(mine) == len(known.blocks)
            elif not method.whole:  # the dearest blocks are not all in one place
                assert len(mine) < len(known.blocks)
        assert all(torch.equal(each, found[0]) for each in found)
        close(found[0], joint(place, method, range(4)))


def parts_of_a_batch_and_short_steps(place: Place) -> None:
    """Of several backward passes the last one averages; ``kl_clip`` shortens all steps alike."""
    for method, workers in itertools.product(METHODS.values(), (1.0, 1 / place.world)):
        found = []
        for shared in (True, False):
            model = Net()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            called = DistributedDataParallel(model) if shared else model
            group, share = (None, workers) if shared else (place.alone, 1.0)
            handle = rankwise.precondition(
                model, method, kl_clip=1e-4, optimizer=optimizer, group=group, workers=share
            )
            for step in range(3):
                before, batches = vector(model), [batch(2 * step + each, EACH * place.world) for each in (0, 1)]
                optimizer.zero_grad()
                for i, (x, y) in enumerate(place.own(*each) if shared else each for each in batches):
                    last = i == 1 or not isinstance(called, DistributedDataParallel)
                    with contextlib.nullcontext() if last else called.no_sync():
                        (functional.cross_entropy(called(x, torch.ones(len(x)).double()), y) / 2).backward()
                handle.step()
                optimizer.step()
                assert 0 < (vector(model) - before).norm() < 0.1
            found.append(vector(model))
        close(*found)


def owners_are_chosen_by_cost(place: Place) -> None:
    costs = {"images": 3**3 + 9**3, "rare": 12**3 + 13**3, "out": 3**3 + 12**3}
    handle = rankwise.precondition(Net(), Moments())
    loads = [0] * place.world
    for name in sorted(costs, key=lambda name: -costs[name]):
        assert handle.curvatures.owner_of[name] == loads.index(min(loads))
        loads[loads.index(min(loads))] += costs[name]
    with pytest.raises(ValueError, match=f"workers must be a share that divides {place.world} processes"):
        rankwise.precondition(Net(), Moments(), workers=1 - 0.25 / place.world)
    first = dist.new_group([0])
    if place.rank:
        with pytest.raises(ValueError, match="this process is not one of the group"):
            rankwise.precondition(Net(), Moments(), group=first)


def uneven_batches(place: Place) -> None:
    """The curvature is the mean over all samples, the gradient the mean of the processes' means."""
    sizes = [2 + each for each in range(place.world)]
    x, y = batch(0, sum(sizes))
    model, reference = Net(), Net()
    handle = rankwise.precondition(model, Sngd(damping=0.3))
    mine = slice(sum(sizes[: place.rank]), sum(sizes[: place.rank + 1]))
    functional.cross_entropy(model(x[mine]), y[mine]).backward()
    place.average(model)
    plain = {name: gradient(layer) for name, layer in model.named_children()}
    handle.step()
    losses = [functional.cross_entropy(reference(a[None]), b[None]) for a, b in zip(x, y, strict=True)]
    for name in ("images", "out"):
        wanted = natural(reference.get_submodule(name), losses, 0.3, plain[name])
        torch.testing.assert_close(gradient(model.get_submodule(name)), wanted)


def layers_that_only_some_processes_call(place: Place) -> None:
    for method in METHODS.values():
        found = []
        for shared in (True, False):
            model = Net()
            called = DistributedDataParallel(model, find_unused_parameters=True) if shared else model
            handle = rankwise.precondition(model, method, group=None if shared else place.alone)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for step in range(3):
                optimizer.zero_grad()
                x, y = batch(step, EACH * place.world)
                first = torch.zeros(len(x)).double()
                if step:
                    first[:EACH] = 1.0  # only the first process has them; at step 0 nobody
                if shared:
                    x, y, first = place.own(x, y, first)
                    out = called(x, first) if first.any() else called(x)
                else:
                    out = called(x, first, None if method.whole else EACH) if step else called(x)
                functional.cross_entropy(out, y).backward()
                assert handle.step()
                optimizer.step()
            found.append(vector(model))
        close(*found)


def sequences_of_other_lengths(place: Place) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.out = nn.Embedding(9, 4), nn.Linear(4, 3)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.out(self.table(x))).mean(1)

    for together in (False, True):
        found = []
        for group in (None, place.alone):
            model = Words()
            handle = rankwise.precondition(model, Sngd(damping=0.3, together=together), tables=True, group=group)
            ranks = [place.rank] if group is None else range(place.world)
            for rank in ranks:
                rng = Generator().manual_seed(rank)
                x, y = torch.randint(0, 9, (3, 2 + rank), generator=rng), torch.arange(3) % 3
                (functional.cross_entropy(model(x), y) / len(ranks)).backward()
            if group is None:
                place.average(model)
            handle.step()
            found.append(torch.cat([gradient(layer) for layer in model.children()]))
        close(*found)


def bytes_are_those_of_the_formula(place: Place) -> None:
    shapes, rows = (
        {"images": (3, 9), "rare": (12, 13), "out": (3, 12)},
        {"images": EACH * 4, "rare": EACH, "out": EACH},
    )
    samples = EACH * place.world
    for workers in (1.0, 1 / place.world):
        model = Net()
        handle = rankwise.precondition(model, Sngd(damping=0.3), workers=workers)
        train(model, handle, range(3), place.own, place.world, average=place.average)
        given = sum(rows[name] * (m + n) * 8 for name, (m, n) in shapes.items())
        counts = (1 + len(shapes)) * 8
        inverses = len(shapes) * (samples**2 * 8 + 8)  # roots, and the damping
        found = {phase: figures["bytes"] for phase, figures in handle.traffic().items()}
        alone = workers < 1  # nobody else multiplies the same gradients
        assert found == {
            "agree": 3 * 2 * (len(shapes) + 2) * 8,
            "exchange": 3 * (given + counts),
            "factorise": 0,
            "invert": 0,
            "broadcast": 0 if alone else 3 * inverses,
            "apply": 0,
            **({"gradients": 3 * sum(m * n * 8 for m, n in shapes.values())} if alone else {}),
        }
        assert all(figures["seconds"] > 0 for figures in handle.traffic().values())
    model = Net()
    handle = rankwise.precondition(model, Sngd(damping=0.3), group=place.alone)
    train(model, handle, range(2), lambda *a: a, place.world)
    assert sum(figures["bytes"] for figures in handle.traffic().values()) == 0


def sharded_parameters(place: Place) -> None:
    mesh = init_device_mesh("cpu", (place.world,))
    for method, workers in itertools.product(METHODS.values(), (1.0, 1 / place.world)):
        model = Net()
        early = rankwise.precondition(model, method)
        fully_shard(model.rare, mesh=mesh)
        fully_shard(model, mesh=mesh)
        x, y = place.own(*batch(0, EACH * place.world))
        functional.cross_entropy(model(x, torch.ones(len(x)).double()), y).backward()
        with pytest.raises(ValueError, match=r"call rankwise.precondition after .* fully_shard"):
            early.step()
        early.remove()
        handle = rankwise.precondition(model, method, workers=workers)
        found = train(model, handle, range(4), place.own, place.world)
        close(found, joint(place, method, range(4)))


def going_on_with_other_numbers_of_processes(place: Place) -> None:
    """From any to any: one, all, and all where each holds only the inverses of its own layers."""
    for name, stop in itertools.product(
        ("moments", "by layers"), (2, 3)
    ):  # before a step that looks, and one that does not
        method = METHODS[name]
        makers: dict[str, Callable[[nn.Module], Conditioning]] = {
            "one": functools.partial(rankwise.precondition, method=method, group=place.alone),
            "all": functools.partial(rankwise.precondition, method=method),
            "parts": functools.partial(rankwise.precondition, method=method, workers=1 / place.world),
        }
        for first, second in itertools.permutations(makers, 2):
            model, found = Net(), None
            for name, steps in ((first, range(stop)), (second, range(stop, 5))):
                handle = makers[name](model)
                if found is not None:
                    handle.load_state_dict(found)
                if name == "one":
                    train(model, handle, steps, lambda *a: a, place.world)
                else:
                    train(model, handle, steps, place.own, place.world, average=place.average)
                states = [copy.deepcopy(handle.state_dict())]
                dist.broadcast_object_list(states, src=0)  # that of the first process, for all
                (found,) = states
                handle.remove()
            whole = Net()
            handle = makers["one"](whole)
            for steps in (range(stop), range(stop, 5)):  # momentum starts anew, as above
                train(whole, handle, steps, lambda *a: a, place.world)
            close(vector(model), vector(whole))


def own_states_go_on_bit_by_bit(place: Place) -> None:
    for method, workers in itertools.product(METHODS.values(), (1.0, 1 / place.world)):
        model = Net()
        handle = rankwise.precondition(model, method, workers=workers)
        train(model, handle, range(3), place.own, place.world, average=place.average)
        other, state = copy.deepcopy(model), copy.deepcopy(handle.state_dict())
        handle.remove()
        again = rankwise.precondition(other, method, workers=workers)
        again.load_state_dict(state)
        found = train(other, again, range(3, 6), place.own, place.world, average=place.average)
        whole = Net()
        straight = rankwise.precondition(whole, method, workers=workers)
        for steps in (range(3), range(3, 6)):
            wanted = train(whole, straight, steps, place.own, place.world, average=place.average)
        assert torch.equal(found, wanted)


def what_processes_must_agree_on(place: Place) -> None:
    model = Net()
    handle = rankwise.precondition(model, Sngd(damping=0.3))
    x, y = place.own(*batch(0, EACH * place.world))
    functional.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match=r"other gradients of layer images; average them"):
        handle.step()
    handle.discard()

    model.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    place.average(model)
    if place.rank == place.world - 1:
        model.out.weight.grad[0] = float("nan")  # nobody averages after this
    with pytest.warns(RuntimeWarning, match="not finite"):
        assert not handle.step()
    assert handle.skipped == 1

    model.zero_grad()
    handle.steps += place.rank
    functional.cross_entropy(model(x), y).backward()
    place.average(model)
    with pytest.raises(ValueError, match="other numbers of steps; load the same state"):
        handle.step()


def turns_are_those_of_the_first_process(place: Place) -> None:
    """Where norms are rounded otherwise, one process may see gradients change quickly and another not."""
    for first in (0, 1):
        model = Net()
        handle = rankwise.precondition(model, HyLo(damping=0.3, rank=2, every=1, window=9))
        train(model, handle, range(1), place.own, place.world, average=place.average)
        for curvature in handle.curvature.values():
            curvature["critical"] = torch.tensor(first if place.rank == 0 else 1 - first)
        found = train(model, handle, range(1, 2), place.own, place.world, average=place.average)
        everywhere(place, found)
        known = [tensors for tensors in handle.curvature.values() if "root" in tensors]
        assert known
        assert all(("mix" in tensors) == bool(first) for tensors in known)


def a_process_that_ends(place: Place) -> None:
    """The others are told what to do, and soon."""
    model = Net()
    handle = rankwise.precondition(model, Sngd(damping=0.3))
    x, y = place.own(*batch(0, EACH * place.world))
    functional.cross_entropy(model(x), y).backward()
    place.average(model)
    if place.rank == place.world - 1:
        os._exit(0)
    with pytest.raises(RuntimeError, match="one of them may have ended or be stuck: end all, and go on from"):
        handle.step()


ALL = [
    sharded_parameters,
    going_on_with_other_numbers_of_processes,
    own_states_go_on_bit_by_bit,
    joint_batch_with_ddp,
    joint_batch_with_all_reduce_and_any_share_of_workers,
    parts_of_a_batch_and_short_steps,
    owners_are_chosen_by_cost,
    uneven_batches,
    layers_that_only_some_processes_call,
    sequences_of_other_lengths,
    bytes_are_those_of_the_formula,
    what_processes_must_agree_on,
    turns_are_those_of_the_first_process,
    a_process_that_ends,  # the last one: it does
]


def work(rank: int, world: int, folder: Path, checks: Sequence[Callable[[Place], None]]) -> None:
    """Be one of several processes: make the checks, and write down after each what came of it."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    store = dist.FileStore(str(folder / "store"), world)
    wait = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=wait)
    place = Place(rank, world, dist.new_group([rank], use_local_synchronization=True))
    for check in checks:
        note = folder / f"{check.__name__}.{rank}"
        if check is a_process_that_ends:
            note.write_text("")  # whoever ends says nothing
        try:
            check(place)
            note.write_text("")
        except BaseException:
            note.write_text(traceback.format_exc())
            os._exit(1)
    os._exit(0)
