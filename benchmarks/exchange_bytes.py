"""How many bytes do processes exchange for a step, projected and whole, and do they train as one process?

Usage: python benchmarks/exchange_bytes.py [--json benchmarks/results/exchange_bytes.json] [--smoke]

The matrices of a small Llama in float32, random gradients of each process, gloo on 2 and 4 processes of one
machine. ``replicas``: each has all parameters, and ``rankwise.Replicated`` averages gradients. The bytes given
to ``all_reduce`` are counted from outside, beside those that torch's DistributedDataParallel gives to its hook of
communication for the same parameters. ``shards``: each has some rows of each matrix (DTensors), and the bytes are
those of whole or projected gradients, as the optimiser counts them; elementwise steps exchange nothing.

A steady step is one in which no basis is due; the mean is over a period, in which each basis is due once. The
difference is the largest between a parameter and what one process makes of the mean gradients, divided by the
largest change of that parameter. The exchange of dct_adamw is small only if it does not choose at each step.
"""

import argparse
import contextlib
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import RESULTS, Rows
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import rankwise
from rankwise.core.fingerprint import digest_of
from rankwise.core.transforms import Transform
from rankwise.optimizers import adam, dct_adamw, frugal, galore, muon, q_galore

WIDTH, INNER, LAYERS, RANK, EVERY = 128, 344, 2, 16, 30
KINDS = ("replicas", "shards")
SHAPES = [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH)] * 2 + [(WIDTH, INNER)]
METHODS: dict[str, Transform] = {
    "adam": adam(),
    "galore": galore(rank=RANK, every=EVERY),
    "q_galore": q_galore(rank=RANK, every=EVERY),
    "dct_adamw": dct_adamw(rank=RANK, every=EVERY),
    "dct_adamw, every step": dct_adamw(rank=RANK),
    "frugal": frugal(every=EVERY),
    "muon": muon(),
}


def drawn(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES * LAYERS]


def of_process(step: int, rank: int) -> list[Tensor]:
    """Gradients of rank RANK and noise, so that there is a subspace to find."""
    pairs = zip(drawn(1), drawn(1000 * step + rank + 2), strict=True)
    return [u[:, :RANK] @ (noise[:RANK] if len(noise) >= RANK else noise) + 0.1 * noise for u, noise in pairs]


@contextlib.contextmanager
def counting() -> Iterator[list[int]]:
    """Collect the bytes of what is given to all_reduce inside."""
    sizes: list[int] = []
    before = dist.all_reduce

    def count(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.nbytes)
        return before(tensor, *args, **kwargs)

    dist.all_reduce = count
    try:
        yield sizes
    finally:
        dist.all_reduce = before


def run(transform: Transform, kind: str, steps: int) -> dict[str, Any]:
    """Train in all processes; returns what this one has counted."""
    world, rank = dist.get_world_size(), dist.get_rank()
    one, mine = [nn.Parameter(w) for w in drawn(0)], [nn.Parameter(w) for w in drawn(0)]
    mesh = init_device_mesh("cpu", (world,))
    if kind == "shards":
        mine = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in mine]
    whole, optimizer = (rankwise.Optimizer([(params, transform)], lr=0.01) for params in (one, mine))
    replicas = rankwise.Replicated(optimizer) if kind == "replicas" else None
    counted, told = [], []
    for step in range(steps):
        found = [of_process(step, each) for each in range(world)]
        means = [torch.stack(each).mean(0) for each in zip(*found, strict=True)]
        for i, mean in enumerate(means):
            one[i].grad = mean
            mine[i].grad = found[rank][i] if replicas else distribute_tensor(mean, mesh, [Shard(0)])
        with counting() as sizes:
            optimizer.step()
        whole.step()
        counted.append(sum(sizes))
        told.append(replicas.traffic()["last"] if replicas else optimizer.traffic())
    if replicas:
        assert counted == told
    ends = [p.detach() if replicas else p.detach().full_tensor() for p in mine]
    digests: list[Any] = [None] * world
    dist.all_gather_object(digests, digest_of({str(i): p for i, p in enumerate(ends)}))
    apart = max(
        float((p - q).detach().abs().max() / (q - start).detach().abs().max())
        for p, q, start in zip(ends, one, drawn(0), strict=True)
    )
    return {
        "first": told[0],
        "steady": min(told[1:]),
        "mean": statistics.mean(told[1:]),
        "difference": apart,
        "alike": len(set(digests)) == 1,
    }


def in_ddp() -> int:
    """Count what DistributedDataParallel exchanges for the same parameters."""
    net = nn.ParameterList([nn.Parameter(w) for w in drawn(0)])
    sizes: list[int] = []

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all = net

        def forward(self) -> Tensor:
            return torch.stack([p.sum() for p in self.all]).sum()

    def hook(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        sizes.append(bucket.buffer().nbytes)
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model = DistributedDataParallel(Sum())
    model.register_comm_hook(None, hook)
    model().backward()
    return sum(sizes)


def work(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    full, rows = in_ddp(), []
    for kind in KINDS:
        for name, transform in METHODS.items():
            found = run(transform, kind, EVERY + 1)
            projected = name in ("galore", "q_galore", "dct_adamw")
            share = {"share": found["steady"] / full, "bound": 1.2 * RANK / WIDTH if projected else None}
            rows.append({"kind": kind, "world": world, "method": name, "ddp": full, **found, **share})
    if rank == 0:
        torch.save(rows, f"{folder}/rows.pt")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS / "exchange_bytes.json")
    parser.add_argument("--smoke", action="store_true", help="two processes only")
    options = parser.parse_args()
    result = Rows(options.json)
    for world in (2,) if options.smoke else (2, 4):
        if all(result.has(world=world, kind=kind, method=name) for kind in KINDS for name in METHODS):
            continue
        with tempfile.TemporaryDirectory() as folder:
            mp.start_processes(work, (world, folder), nprocs=world, start_method="spawn")
            for row in torch.load(f"{folder}/rows.pt"):
                if not result.has(
                    world=world, kind=row["kind"], method=row["method"]
                ):  # an earlier run stopped here
                    result.add(**row, rank=RANK, smaller_side=WIDTH)
    for row in result.rows:
        assert row["alike"], row
        assert row["bound"] is None or row["share"] <= row["bound"], row


if __name__ == "__main__":
    main()
