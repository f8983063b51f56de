"""What curvature costs a layer: seconds to factorise, invert and apply, and bytes to exchange, beside formulas.

Usage: python benchmarks/curvature_cost.py [--limit 20] [--rounds 3]
Writes results/curvature_cost.json; a second run goes on where the first stopped. ``--smoke`` takes small layers.

Parts: ``width`` and ``batch``, square linear layers of one width and batch, without sequences; ``ResNet-32`` and
``ResNet-50``, shapes of these networks (of the latter some) with as many positions as their images have there,
``count`` of each in the network. Inputs and gradients of outputs are random. Each round is one forward and
backward pass and one step that looks at the samples, by each method in turn; figures are medians over the rounds
after the first. ``factorise`` begins with what the hooks kept and includes the patches of convolutions.

Bytes are those of float32 tensors that one process gives to the others (``exchange``), and that the owner of a
layer then gives them (``broadcast``). Formulas count multiplications and numbers for one process, with n inputs,
m outputs, N samples, T positions and r = N/10 kept samples. K-FAC: N T (n^2 + m^2) to factorise, n^3 + m^3 to
invert, 2 m n (m + n) to apply, n^2 + m^2 numbers to exchange. SNGD: N^2 (m + n) + N^3 / 3 to invert, 2 N m n to
apply, N (m + n) numbers. HyLo: KIS N (m + n) to factorise, r^2 (m + n) + r^3 to invert, 2 r m n to apply,
r (m + n) numbers; KID besides N^2 (m + n) + N r^2 + N^3 to factorise and r^2 numbers.

What would take a method longer than ``--limit`` seconds a round, as its dearest layers so far and the formulas
foretell, is passed over, and the row says so.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Rows
from second_order_methods import RANK, Handle, Ours, Theirs
from torch import Tensor, nn

from rankwise.linalg import reduced
from rankwise.preconditioners import HyLo, Kfac, Sngd


@dataclass(frozen=True)
class Layer:
    """A convolution, or with ``kernel`` 0 a linear layer, without a bias.

    Args:
        part: of the benchmark.
        inputs: channels.
        outputs: channels.
        kernel: its side.
        side: of the image that comes out.
        stride: of the convolution.
        batch: samples.
        count: how many the network has.
    """

    part: str
    inputs: int
    outputs: int
    kernel: int = 0
    side: int = 1
    stride: int = 1
    batch: int = 512
    count: int = 1

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(m, n, N, T)."""
        return self.outputs, self.inputs * max(1, self.kernel) ** 2, self.batch, self.side**2

    def build(self) -> tuple[nn.Module, Tensor, Tensor]:
        """Return a network of the layer alone, its input and the gradient of its output."""
        torch.manual_seed(0)
        if not self.kernel:
            layer = nn.Linear(self.inputs, self.outputs, bias=False)
            x, g = torch.randn(self.batch, self.inputs), torch.randn(self.batch, self.outputs)
        else:
            options: dict[str, Any] = {"stride": self.stride, "padding": self.kernel // 2, "bias": False}
            layer = nn.Conv2d(self.inputs, self.outputs, self.kernel, **options)
            wide = self.side * self.stride
            x = torch.randn(self.batch, self.inputs, wide, wide)
            g = torch.randn(self.batch, self.outputs, self.side, self.side)
        return nn.Sequential(layer), x.relu(), g / self.batch


PHASES = ("factorise", "invert", "apply")


def squares(sides: tuple[int, ...], batch: int) -> list[Layer]:
    return [Layer("width", side, side, batch=batch) for side in sides]


RESNET32 = [
    Layer("ResNet-32", 3, 16, 3, 32),
    Layer("ResNet-32", 16, 16, 3, 32, count=10),
    Layer("ResNet-32", 16, 32, 3, 16, 2),
    Layer("ResNet-32", 32, 32, 3, 16, count=9),
    Layer("ResNet-32", 32, 64, 3, 8, 2),
    Layer("ResNet-32", 64, 64, 3, 8, count=9),
    Layer("ResNet-32", 64, 10),
]
RESNET50 = [
    Layer("ResNet-50", 256, 64, 1, 56, batch=80, count=2),
    Layer("ResNet-50", 128, 128, 3, 28, batch=80, count=3),
    Layer("ResNet-50", 1024, 256, 1, 14, batch=80, count=5),
    Layer("ResNet-50", 256, 256, 3, 14, batch=80, count=5),
    Layer("ResNet-50", 2048, 1000, batch=80),
    Layer("ResNet-50", 512, 512, 3, 7, batch=80, count=2),
]
LAYERS = [
    *squares((256, 512, 1024, 2048, 4096), 256),
    *(Layer("batch", 1024, 1024, batch=batch) for batch in (128, 256, 512, 1024, 2048)),
    *RESNET32,
    *RESNET50,
]
SMOKE = [*squares((16, 32), 32), Layer("ResNet-32", 4, 4, 3, 8, batch=32, count=2)]


@dataclass(frozen=True)
class Method:
    """What is timed, and its formulas.

    Args:
        make: its handle for a network.
        flops: multiplications to factorise, to invert, to apply for m, n, N, T and r.
        floats: numbers to exchange.
    """

    make: Callable[[nn.Module], Handle]
    flops: Callable[[int, int, int, int, int], tuple[float, float, float]]
    floats: Callable[[int, int, int, int, int], float]


class Counted(Ours):
    """One of our methods, with bytes counted as if there were other processes."""

    def __init__(self, model: nn.Module, method: Any) -> None:
        super().__init__(model, torch.optim.SGD(model.parameters(), lr=0.1), method)
        self.given = {"exchange": 0, "broadcast": 0}
        exchange = self.handle.exchange
        for name in ("gather", "add", "spread"):
            setattr(exchange, name, self._counted(getattr(exchange, name)))

    def _counted(self, function: Callable) -> Callable:
        def counted(phase: str, tensors: Mapping[str, Tensor], *rest: Any) -> dict[str, Tensor]:
            self.given[phase] += sum(t.nbytes for name, t in tensors.items() if name != "counts")
            return function(phase, tensors, *rest)

        return counted


class Rival(Theirs):
    """kfac-pytorch, with bytes counted likewise."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, torch.optim.SGD(model.parameters(), lr=0.1), 0.003, 1)

    @property
    def given(self) -> dict[str, int]:
        """Bytes of factors, and of what the inversion makes of them."""
        ((_, layer),) = self.kfac._layers.values()
        sizes = layer.memory_usage()
        return {"exchange": _sum(sizes, "factors"), "broadcast": _sum(sizes, "inverses")}


def _sum(sizes: Mapping[str, int], kind: str) -> int:
    return sum(size for name, size in sizes.items() if name.endswith(kind))


def _kfac(m: int, n: int, samples: int, t: int, r: int) -> tuple[float, float, float]:
    return samples * t * (n**2 + m**2), n**3 + m**3, 2 * m * n * (m + n)


def _kfac_floats(m: int, n: int, samples: int, t: int, r: int) -> float:
    return n**2 + m**2


def _kept(m: int, n: int, samples: int, t: int, r: int) -> tuple[float, float, float]:
    return samples * (m + n), r**2 * (m + n) + r**3, 2 * r * m * n


def _interpolated(m: int, n: int, samples: int, t: int, r: int) -> tuple[float, float, float]:
    first, *others = _kept(m, n, samples, t, r)
    return first + samples**2 * (m + n) + samples * r**2 + samples**3, *others


METHODS = {
    "kfac-pytorch": Method(Rival, _kfac, _kfac_floats),
    "K-FAC": Method(lambda model: Counted(model, Kfac(damping=1.0)), _kfac, _kfac_floats),
    "SNGD": Method(
        lambda model: Counted(model, Sngd(damping=1.0, sharing=reduced)),
        lambda m, n, samples, t, r: (0, samples**2 * (m + n) + samples**3 / 3, 2 * samples * m * n),
        lambda m, n, samples, t, r: samples * (m + n),
    ),
    "HyLo, KID": Method(
        lambda model: Counted(model, HyLo(rank=RANK, damping=1.0, mode="kid")),
        _interpolated,
        lambda m, n, samples, t, r: r * (m + n) + r**2,
    ),
    "HyLo, KIS": Method(
        lambda model: Counted(model, HyLo(rank=RANK, damping=1.0, mode="kis")),
        _kept,
        lambda m, n, samples, t, r: r * (m + n),
    ),
}


def phases(handle: Handle) -> dict[str, float]:
    """Return the seconds of each phase so far."""
    return {name: found["seconds"] for name, found in handle.phases().items()}


class Bench:
    """Times what is not in the results yet.

    Args:
        rows: the results.
        limit: seconds of a method's round.
        rounds: over which medians are taken, after a first one; one is enough above a tenth of the limit.
    """

    def __init__(self, rows: Rows, limit: float, rounds: int) -> None:
        self.rows, self.limit, self.rounds = rows, limit, rounds

    def time(self, layer: Layer) -> None:
        """Let the methods take turns on a layer."""
        methods = {name: each for name, each in METHODS.items() if not self.rows.has(method=name, **vars(layer))}
        for name in [*methods]:
            if (seconds := self.foretold(name, layer)) > self.limit:
                self.rows.add(method=name, **vars(layer), skipped=f"would take some {seconds:.0f} s a round")
                del methods[name]
        network, x, g = layer.build()
        found: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
        about: dict[str, dict[str, Any]] = {}
        for name in (name for _ in range(self.rounds + 1) for name in methods):
            if len(found[name]) > 1 and sum(found[name][-1].values()) > self.limit / 10:
                continue
            handle = methods[name].make(network)
            network.zero_grad()
            network(x).backward(g)
            handle.step()
            found[name].append(phases(handle))
            about[name] = {"bytes": dict(handle.given), "state": handle.state()}
            handle.remove()
        for name, rounds in found.items():
            *sizes, n, t = layer.sizes
            flops = METHODS[name].flops(*sizes, n, t, max(1, int(RANK * n)))
            later = rounds[1:]
            seconds = {key: statistics.median(each.get(key, 0.0) for each in later) for key in PHASES}
            self.rows.add(
                method=name,
                **vars(layer),
                seconds=seconds,
                rounds=len(later),
                **about[name],
                flops=dict(zip(PHASES, flops, strict=True)),
                floats=METHODS[name].floats(*sizes, n, t, max(1, int(RANK * n))),
            )

    def foretold(self, name: str, layer: Layer) -> float:
        """Return the seconds of a round, each phase as fast as where it had most to do so far."""
        m, n, samples, t = layer.sizes
        work = METHODS[name].flops(m, n, samples, t, max(1, int(RANK * samples)))
        known = [row for row in self.rows.rows if row["method"] == name and "seconds" in row]
        seconds = 0.0
        for phase, flops in zip(PHASES, work, strict=True) if known else ():
            row = max(known, key=lambda row: row["flops"][phase])
            seconds += row["seconds"][phase] * flops / max(1, row["flops"][phase])
        return seconds


def totals(rows: list[dict[str, Any]], part: str) -> dict[str, dict[str, float]]:
    """Return seconds and bytes of a whole network by method, of the layers that every method was timed on."""
    mine = [row for row in rows if row["part"] == part]
    shape = ("inputs", "outputs", "kernel", "side", "stride", "batch")
    left_out = {tuple(row[key] for key in shape) for row in mine if "skipped" in row}
    found: dict[str, dict[str, float]] = {}
    for row in mine:
        if tuple(row[key] for key in shape) not in left_out:
            each = found.setdefault(
                row["method"], dict.fromkeys(("refresh", "apply", "exchange", "broadcast"), 0)
            )
            each["refresh"] += row["count"] * (row["seconds"]["factorise"] + row["seconds"]["invert"])
            each["apply"] += row["count"] * row["seconds"]["apply"]
            for phase, size in row["bytes"].items():
                each[phase] += row["count"] * size
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Return all rows and the networks' totals as text."""
    lines = []
    for row in rows:
        about = "{part:10}{inputs:6}{outputs:6}{kernel:3}{side:4}{batch:6}  {method:14}".format(**row)
        if "skipped" in row:
            lines.append(f"{about}  {row['skipped']}")
            continue
        seconds = "".join(f"{row['seconds'][key]:11.5f}" for key in PHASES)
        lines.append(about + seconds + "".join(f"{size / 1e6:10.3f}" for size in row["bytes"].values()))
    for part in ("ResNet-32", "ResNet-50"):
        for method, each in totals(rows, part).items():
            figures = f"{each['refresh']:9.3f} s{each['apply']:9.3f} s"
            lines.append(
                f"{part} {method:14}{figures}{each['exchange'] / 1e6:9.3f}{each['broadcast'] / 1e6:9.3f} MB"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "curvature_cost.json")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.smoke:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Rows(Path(folder) / "smoke.json"), 1.0, 1)
            for layer in SMOKE:
                bench.time(layer)
            print(table(bench.rows.rows))
        return
    bench = Bench(Rows(options.out), options.limit, options.rounds)
    for layer in [] if options.table else LAYERS:
        bench.time(layer)
    print(table(bench.rows.rows))


if __name__ == "__main__":
    main()
