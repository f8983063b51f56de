"""How soon second-order methods reach a score, in steps, epochs and seconds, each tuned with as many trials.

Usage: python benchmarks/second_order.py --data DATA [--size tiny|small|full] [--task NAME]... [--method NAME]...
       [--device cpu] [--processes 2]... [--images N] [--width N] [--batch N] [--steps N] [--every N]
Writes results/second_order.json, a row for each training; a second run goes on where the first stopped.
``--table`` prints what is there; ``--smoke`` gives every method some steps on made-up data. The small size takes
two processor cores about an hour, the tiny one some minutes; the full one is for an accelerator.

Tasks: ResNets on JPEG images without augmentation, a U-Net that finds the noise on such images, and a Transformer
of characters. A method steps the weights and biases of convolutions and linear layers; norms and embeddings get
AdamW at the rate that is best for AdamW alone (so that one is tuned first). Second-order methods change the
gradient, which SGD with momentum 0.9 then steps. Rates rise over a tenth of the steps and fall to a tenth by a
cosine; there is no weight decay. All see the same batches in the same order.

Every method has as many trials with seed 0, of its learning rate alone or of it and the damping: first the usual
ones, then the next untried neighbour of the best, half a decade of the rate or a decade of the damping away, and
half as far when all are tried. The mean over the second half of the looks at samples kept aside chooses. The
chosen ones are then trained with two more seeds. The target is the worst score that SGD with momentum has at an
end. Trainings of all methods take turns, step by step, so that what else a machine does hits all alike; seconds
are those of the steps alone, without looks. kfac-pytorch (``pip install --no-deps kfac-pytorch``) has the
settings of its examples, factors at each step and inverses at some (``seldom``: both at some), and is told the
learning rate of each step. Steps of second-order methods are shortened by a bound on the predicted change of the
outputs, which goes with the square of the rate.

``--processes`` instead counts bytes and seconds of a few steps of so many processes over gloo, each with its part
of the batch.
"""

import argparse
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Rows
from second_order_methods import METHODS, Entry, adamw, held, nothing
from second_order_tasks import TASKS, Batch, Sizes, Task
from torch import Tensor, nn
from torch import distributed as dist

SEEDS, TRIALS, LOOKS = (0, 1, 2), 5, 15
REFERENCE = "SGD, momentum"  # the worst score that it has at an end is the target
SIZES = {
    "smoke": {name: Sizes(64, 20, 4, 16, 4, 2) for name in TASKS},
    "tiny": {
        "resnet8": Sizes(1000, 300, 4, 50, 100, 10),
        "transformer": Sizes(0, 100, 32, 32, 100, 10),
    },
    "small": {
        "resnet20": Sizes(2500, 500, 8, 100, 125, 10),
        "denoiser": Sizes(2500, 300, 8, 50, 125, 10),
        "transformer": Sizes(0, 200, 64, 64, 200, 10),
    },
    "full": {
        "resnet20": Sizes(20000, 4000, 16, 128, 2000, 20),
        "resnet32": Sizes(20000, 4000, 16, 512, 800, 10),
        "denoiser": Sizes(20000, 2000, 16, 128, 1000, 20),
        "transformer": Sizes(0, 500, 128, 64, 1500, 20),
    },
}


def rate(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step from zero."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm))


class Trained:
    """A model at work.

    Args:
        task: to learn.
        entry: of the method.
        place: decimal logarithms of the learning rate, or its multiple of the damping, and the damping.
        rest: decimal logarithm of the rate of all that is no matrix.
        seed: of the model and the batches.
        sizes: how much.
        device: where.
    """

    def __init__(
        self, task: Task, entry: Entry, place: tuple[float, ...], rest: float, seed: int, sizes: Sizes, device
    ) -> None:
        torch.manual_seed(seed)
        self.task, self.steps, self.device = task, sizes.steps, device
        self.model = task.build().to(device)
        kinds = (nn.Linear, nn.Conv2d)
        layers = [p for layer in self.model.modules() if isinstance(layer, kinds) for p in layer.parameters()]
        others = [p for p in self.model.parameters() if all(p is not q for q in layers)]
        self.optimizers = [
            entry.optimizer(layers, entry.rate(place)),
            *([adamw(others, 10**rest)] if others else []),
        ]
        schedule = torch.optim.lr_scheduler.LambdaLR
        self.schedules = [schedule(each, lambda step: rate(step, sizes.steps)) for each in self.optimizers]
        self.handle = entry.attach(self.model, self.optimizers[0], 10 ** place[-1], sizes.every)

    def step(self, batch: Batch) -> float:
        """Take a step; return its seconds."""
        start = self.now()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss = self.task.loss(self.model, (batch[0].to(self.device), batch[1].to(self.device)))
        loss.backward()
        if not bool(loss.isfinite()):
            raise FloatingPointError("the loss is not finite")
        if dist.is_initialized():
            for parameter in self.model.parameters():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad.div_(dist.get_world_size()))
        self.handle.step(self.task.positions)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
        return self.now() - start

    def state(self) -> int:
        """Return the bytes of the optimisers' and the method's state."""
        kept = [t for each in self.optimizers for s in each.state.values() for t in s.values()]
        return held(t for t in kept if isinstance(t, Tensor)) + self.handle.state()

    def now(self) -> float:
        """Return the time when all that was asked for is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def training(trained: Trained, seed: int) -> Generator[None, None, dict[str, Any]]:
    """Train, a step at a time; return what was found."""
    task, steps, seconds, looks, most = trained.task, trained.steps, [], [], 0
    due = {round(steps * (i + 1) / LOOKS) for i in range(LOOKS)}
    batches = itertools.islice(task.batches(seed), steps)
    failed = None
    try:
        for step, batch in enumerate(batches, 1):
            seconds.append(trained.step(batch))
            most = max(most, trained.state())
            if step in due:
                scores = [task.scored(trained.model, data, trained.device) for data in (task.choose, task.judge)]
                epochs = step * task.batch / len(task.learn[0])
                looks.append([step, round(epochs, 3), round(sum(seconds), 3), *(round(s, 5) for s in scores)])
            yield
    except (FloatingPointError, torch.linalg.LinAlgError) as error:
        failed = str(error).splitlines()[0]
    later = [look[3] for look in looks[len(looks) // 2 :]]
    found: dict[str, Any] = {
        "choose": round(statistics.fmean(later), 5) if later and not failed else None,
        "looks": looks,
        "seconds": round(sum(seconds), 2),
        "step_ms": round(1000 * statistics.median(seconds), 2) if seconds else None,
        "state": most,
        "phases": trained.handle.phases(),
    }
    return found | ({"failed": failed} if failed else {})


def together(
    trainings: Mapping[Any, Generator[None, None, dict[str, Any]]],
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Let trainings take turns, step by step; give the result of each as it ends."""
    left = dict(trainings)
    while left:
        for key in list(left):
            try:
                next(left[key])
            except StopIteration as stop:
                del left[key]
                yield key, stop.value


def next_trial(tried: Mapping[tuple[float, ...], float]) -> tuple[float, ...]:
    """Return the first untried neighbour of the best place; where there is none, at half the distance.

    >>> next_trial({(-1.0,): 3.0}), next_trial({(-1.0,): 3.0, (-0.5,): 2.0})
    ((-0.5,), (0.0,))
    >>> next_trial({(0.0, 0.0): 1.0, (0.5, 0.0): 2.0, (-0.5, 0.0): 2.0})
    (0.0, 1.0)
    """
    best = min(tried, key=lambda place: tried[place])
    far = 1.0
    while True:
        for axis, unit in enumerate((0.5, 1.0)[: len(best)]):
            for sign in (1, -1):
                near = tuple(x + sign * far * unit * (i == axis) for i, x in enumerate(best))
                if near not in tried:
                    return near
        far /= 2


class Bench:
    """Trains what is not in the results yet.

    Args:
        rows: the results.
        name: of the task.
        task: to learn.
        sizes: of the model and its training.
        device: where.
        seeds: of those at the chosen place.
        trials: of each method.
    """

    def __init__(
        self,
        rows: Rows,
        name: str,
        task: Task,
        sizes: Sizes,
        device: torch.device,
        seeds: tuple[int, ...] = SEEDS,
        trials: int = TRIALS,
    ) -> None:
        self.rows, self.task, self.sizes, self.device = rows, task, sizes, device
        self.seeds, self.trials = seeds, trials
        self.about = {"part": "training", "task": name, **vars(sizes), "device": device.type}

    def run(self, wanted: Mapping[str, tuple[float, ...]], rest: float | None, seed: int) -> None:
        """Train methods at their places, taking turns, as far as they are not in the results."""
        abouts = {
            method: {
                **self.about,
                "method": method,
                "place": [*place],
                "rest": place[0] if rest is None else rest,
            }
            | {"seed": seed}
            for method, place in wanted.items()
        }
        missing = {method: about for method, about in abouts.items() if not self.rows.has(**about)}
        trainings = {
            method: training(
                Trained(self.task, METHODS[method], wanted[method], about["rest"], seed, self.sizes, self.device),
                seed,
            )
            for method, about in missing.items()
        }
        for method, found in together(trainings):
            self.rows.add(**missing[method], **found)

    def search(self, methods: list[str], rest: float | None) -> dict[str, tuple[float, ...]]:
        """Return the best places; all methods try at the same time. AdamW steps all at one rate."""
        tried: dict[str, dict[tuple[float, ...], float]] = {method: {} for method in methods}
        for _ in range(self.trials):
            wanted = {m: next_trial(tried[m]) if tried[m] else METHODS[m].usual for m in methods}
            self.run(wanted, rest, 0)
            for method, place in wanted.items():
                about = self.about | {"method": method, "place": [*place], "seed": 0}
                row = self.rows.find(**about, rest=place[0] if rest is None else rest)
                tried[method][place] = math.inf if row["choose"] is None else row["choose"]
        return {method: min(each, key=lambda place: each[place]) for method, each in tried.items()}

    def compare(self, methods: list[str]) -> None:
        """Search and train the methods, AdamW before the others."""
        first = self.search(["AdamW"], None)
        (rest,) = first["AdamW"]
        found = self.search([method for method in methods if method != "AdamW"], rest)
        chosen = {method: (first | found)[method] for method in methods}
        for seed in self.seeds:
            self.run(chosen, rest, seed)
        self.mark(chosen, rest)

    def mark(self, chosen: Mapping[str, tuple[float, ...]], rest: float) -> None:
        """Say of the trainings at the chosen places when they reached the worst end of SGD with momentum."""
        mine = [row for row in self.rows.rows if self.about.items() <= row.items() and row["looks"]]
        for row in mine:
            if row["method"] in chosen:
                at = row["place"] == [*chosen[row["method"]]] and row["rest"] == rest
                row["chosen"] = at and row["seed"] in self.seeds
        final = [row for row in mine if row.get("chosen")]
        ends = [row["looks"][-1][4] for row in final if row["method"] == REFERENCE]
        for row in final if ends else ():
            row["target"] = max(ends)
            row["reached"] = next((look[:3] for look in row["looks"] if look[4] <= row["target"]), None)
        self.rows.write()


def exchange(rank: int, processes: int, file: str, method: str, task: Task, sizes: Sizes, result: str) -> None:
    """Take a few steps on one of several processes; the first writes what they told each other."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=processes)
    entry = METHODS[method]
    trained = Trained(task, entry, entry.usual, -3.0, 0, sizes, torch.device("cpu"))
    seconds = []
    for x, y in itertools.islice(task.batches(0), sizes.steps):
        seconds.append(trained.step((x.chunk(processes)[rank], y.chunk(processes)[rank])))
    weights = torch.cat([p.detach().flatten() for p in trained.model.parameters()])
    mean = weights.clone()
    dist.all_reduce(mean.div_(processes))
    apart = (weights - mean).abs().max()
    dist.all_reduce(apart, op=dist.ReduceOp.MAX)
    if rank == 0:
        found = {"phases": trained.handle.phases(), "step_ms": 1000 * statistics.median(seconds)}
        torch.save({**found, "gradients": weights.nbytes, "apart": float(apart)}, result)
    dist.destroy_process_group()


def exchanged(rows: Rows, name: str, task: Task, sizes: Sizes, methods: list[str], processes: int) -> None:
    """Count what processes tell each other."""
    sizes = replace(sizes, steps=2 * sizes.every)
    for method in methods:
        about = {"part": "exchange", "task": name, "method": method, "processes": processes, **vars(sizes)}
        if METHODS[method].attach is nothing or rows.has(**about):
            continue
        with tempfile.TemporaryDirectory() as folder:
            file, result = f"{folder}/meeting", f"{folder}/result"
            given = (processes, file, method, task, sizes, result)
            # forked: the data are already in memory, and closures do not travel
            torch.multiprocessing.start_processes(exchange, given, nprocs=processes, start_method="fork")
            rows.add(**about, **torch.load(result))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the trainings at the chosen places, task by task, as text."""
    keys = ("task", *Sizes.__dataclass_fields__, "device")
    final, lines = [row for row in rows if row.get("chosen")], []
    for case in dict.fromkeys(tuple(row[key] for key in keys) for row in final):
        mine = [row for row in final if tuple(row[key] for key in keys) == case]
        about = ", ".join(f"{key} {value}" for key, value in zip(keys, case, strict=True))
        lines += [f"{about}; to {mine[0].get('target', math.nan):.4f}"]
        lines += [
            f"{'method':22}{'place':>16}{'end':>9}{'steps':>8}{'epochs':>8}{'seconds':>9}{'step ms':>9}{'MB':>8}"
        ]
        for method in dict.fromkeys(row["method"] for row in rows):
            each = [row for row in mine if row["method"] == method]
            if not each:
                continue
            there = [row["reached"] for row in each if row.get("reached")]
            medians = [f"{statistics.median(values):.4g}" for values in zip(*there, strict=True)] or ["-"] * 3
            place = ", ".join(f"{10**x:.2g}" for x in each[0]["place"])
            end, step = statistics.fmean(row["looks"][-1][4] for row in each), each[0]["step_ms"]
            figures = "".join(f"{each:>{width}}" for each, width in zip(medians, (8, 8, 9), strict=True))
            lines.append(
                f"{method:22}{place:>16}{end:9.4f}{figures}{step:9.1f}{each[0]['state'] / 1e6:8.2f}"
                f"  {len(there)} of {len(each)}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--size", choices=["tiny", "small", "full"], default="small")
    parser.add_argument("--task", action="append", choices=list(TASKS))
    parser.add_argument("--method", action="append", choices=list(METHODS))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--processes", type=int, action="append")
    parser.add_argument("--trials", type=int, default=TRIALS)
    for name in Sizes.__dataclass_fields__:
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS / "second_order.json")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.smoke:
        with tempfile.TemporaryDirectory() as folder:
            rows = Rows(Path(folder) / "smoke.json")
            run(rows, options, SIZES["smoke"], (0,), 1)
            print(table(rows.rows))
        return
    rows = Rows(options.out)
    if not options.table:
        if options.data is None:
            parser.error("--data is needed.")
        run(rows, options, SIZES[options.size], SEEDS, options.trials)
    print(table(rows.rows))


def run(rows: Rows, options: argparse.Namespace, known: dict[str, Sizes], seeds: tuple[int, ...], trials: int):
    """Train, or count, what is asked for."""
    methods = options.method or list(METHODS)
    for name in options.task or list(known):
        if name not in known:
            raise SystemExit(f"{name} is not among the tasks of this size: {', '.join(known)}.")
        changed = {key: getattr(options, key) for key in Sizes.__dataclass_fields__}
        sizes = replace(known[name], **{key: value for key, value in changed.items() if value is not None})
        task = TASKS[name](options.data, sizes)
        for processes in options.processes or ():
            exchanged(rows, name, task, sizes, methods, processes)
        if not options.processes:
            Bench(rows, name, task, sizes, options.device, seeds, trials).compare(methods)


if __name__ == "__main__":
    main()
