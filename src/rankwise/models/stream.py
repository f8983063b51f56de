"""Statistics of a model that does not fit in memory: two sweeps over its blocks."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import median_low
from typing import Any

import torch
from torch import Generator, Tensor

from ..core.errors import CalibrationError
from ..core.finite import is_finite
from ..core.labels import Labels
from ..core.progress import track
from ..core.statistics import Batch, Statistic, Stats, divide_alike
from ..core.statistics_file import gradient_counts, pack, unpack
from ..core.steps import Steps
from ..core.surgery import Site
from ..core.tensor_file import write_tensors
from ..core.watch import Watch
from .blocks import Chain
from .checkpoint import Checkpoint

SUMS = "statistics.safetensors"
OUTSIDE = ""  # the path of the part that is not in the blocks

Each = Callable[[int, Batch, Watch], Mapping[str, Tensor]]


def parts_of(chain: Chain, sites: Mapping[str, Site]) -> dict[str, dict[str, Site]]:
    """Return the sites of each block by its path, and of the part outside.

    Raises:
        ValueError: if a weight stands in two of them.
    """
    parts: dict[str, dict[str, Site]] = {part: {} for part in (*chain.names, OUTSIDE)}
    for name, site in sites.items():
        found = {
            next((part for part in chain.names if path.startswith(f"{part}.")), OUTSIDE) for path in site.names
        }
        if len(found) > 1:
            raise ValueError(
                f"layers {' and '.join(site.names[:2])} share a weight, which cannot be taken block by block; "
                "compress in memory and all at once, or leave them out with 'where'."
            )
        parts[found.pop()][name] = site
    return parts


class Sweeps:
    """Collects what :func:`rankwise.core.watch.collect` does, with one block in memory at a time.

    The forward sweep runs all batches through one block after the other; ``hidden-i`` holds what enters block i.
    If gradients are needed, the backward sweep runs each block again, from the last to the first, and passes
    on the gradients of what it was given; ``gradient-i`` holds those of ``hidden-i``.

    Args:
        checkpoint: whose part outside the blocks is filled.
        chain: its model.
        steps: where everything is kept.
        batches: what the model takes.
        parts: from :func:`parts_of`.
        needs: the statistics to fill.
        labels: see :func:`rankwise.core.watch.collect`.
        seed: of the labels.
        strict: see :class:`rankwise.core.watch.Watch`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        chain: Chain,
        steps: Steps,
        batches: Sequence[Batch],
        parts: Mapping[str, Mapping[str, Site]],
        needs: Sequence[type[Statistic]],
        labels: Labels,
        seed: int,
        strict: bool,
    ) -> None:
        self.strict = strict
        self.checkpoint, self.chain, self.steps, self.batches = checkpoint, chain, steps, batches
        self.parts, self.needs, self.labels, self.seed = parts, needs, labels, seed
        self.gradients = any(need.side != "input" for need in needs)
        self.count = len(chain.names)

    def run(self) -> None:
        """Make both sweeps, or what is missing of them."""
        with self.checkpoint.filled(self.chain.names[0]), torch.no_grad():
            self.chain.learn(self.batches[0])
        self._step("hidden-0", {}, lambda b, batch, watch: {"x": self.chain.enter(batch)})
        for i in track(range(self.count), "forward"):
            self._forward(i)
        self._after()
        if self.gradients:
            for i in track(range(self.count - 1, -1, -1), "backward", self.count):
                self._backward(i)
        self._before()

    def hidden(self, i: int) -> list[Tensor]:
        """Return what enters block i, batch by batch."""
        return [self._read(f"hidden-{i}", b) for b in range(len(self.batches))]

    def statistics(self, part: str) -> dict[str, Stats]:
        """Return the statistics of the layers of a part."""
        if part == OUTSIDE:
            found = {name: {} for name in self.parts[part]} | self._sums("after") | self._sums("before")
        else:
            i = self.chain.names.index(part)
            found = self._sums(f"gradient-{i}" if self.gradients else f"hidden-{i + 1}")
        if self.gradients:
            divide_alike(found.values(), self._rows)
        return found

    @cached_property
    def _rows(self) -> int:
        """The rows of the median layer of all parts, once all are known."""
        steps = ["after", "before", *(f"gradient-{i}" for i in range(self.count))]
        listings = [self.steps.figures(step)["statistics"] for step in steps if self.steps.has(step)]
        return median_low(count for listing in listings for count in gradient_counts(listing))

    def _forward(self, i: int) -> None:
        part = self.chain.names[i]

        def each(b: int, batch: Batch, watch: Watch) -> Mapping[str, Tensor]:
            with watch.on(self.chain.model):
                y = self.chain.block(i, batch, self._read(f"hidden-{i}", b))
            finite(y, f"block {part} makes hidden states")
            return {"x": y}

        self._step(f"hidden-{i + 1}", {} if self.gradients else self.parts[part], each, part)

    def _backward(self, i: int) -> None:
        part = self.chain.names[i]
        later = "after" if i + 1 == self.count else f"gradient-{i + 1}"

        def each(b: int, batch: Batch, watch: Watch) -> Mapping[str, Tensor]:
            x = self._read(f"hidden-{i}", b).requires_grad_()
            with watch.on(self.chain.model), torch.enable_grad():
                y = self.chain.block(i, batch, x)
                y.backward(self._read(later, b))
            return {"x": _gradient(x, f"block {part}")}

        self._step(f"gradient-{i}", self.parts[part], each, part)

    def _after(self) -> None:
        """Run what comes after the blocks, from the loss if gradients are needed."""
        if not self.gradients and not self.parts[OUTSIDE]:
            return
        generator = Generator().manual_seed(self.seed)

        def each(b: int, batch: Batch, watch: Watch) -> Mapping[str, Tensor]:
            x = self._read(f"hidden-{self.count}", b).requires_grad_(self.gradients)
            with torch.set_grad_enabled(self.gradients), contextlib.ExitStack() as after:
                output = self.chain.leave(batch, x, lambda: after.enter_context(watch.on(self.chain.model)))
                if not self.gradients:
                    return {}
                self.labels(output, batch, generator).backward()
            return {"x": _gradient(x, "the part after the blocks")}

        self._step("after", self.parts[OUTSIDE], each, some=True)

    def _before(self) -> None:
        """Run what comes before the blocks, and back to it if gradients are needed."""
        if not self.parts[OUTSIDE] or not self.needs:
            return

        def each(b: int, batch: Batch, watch: Watch) -> Mapping[str, Tensor]:
            with watch.on(self.chain.model), torch.set_grad_enabled(self.gradients):
                x = self.chain.enter(batch)
                if x.requires_grad:
                    x.backward(self._read("gradient-0", b))
            return {}

        self._step("before", self.parts[OUTSIDE], each, some=True)
        before, after = (self.steps.figures(step)["statistics"]["layers"] for step in ("before", "after"))
        for name in self.parts[OUTSIDE]:
            if (name in before and name in after) or (self.strict and name not in before and name not in after):
                places = "both before and after the blocks" if name in before else "never"
                raise CalibrationError(f"layer {name} is reached {places}; leave it out with 'where'.")

    def _step(
        self, name: str, sites: Mapping[str, Site], each: Each, part: str | None = None, some: bool = False
    ) -> None:
        """Run all batches through something, and keep what it returns and the statistics that it fills.

        Args:
            name: of the step.
            sites: the layers to watch.
            each: is given the number of a batch, the batch, and what fills the statistics.
            part: path of the module that has to be filled.
            some: whether not all of the sites need be reached.
        """

        def make(folder: Path) -> dict[str, Any]:
            watch = Watch(sites if self.needs else {}, self.needs, strict=self.strict)
            filled = contextlib.nullcontext() if part is None else self.checkpoint.filled(part)
            with filled, torch.no_grad():
                for b, batch in enumerate(self.batches):
                    watch.begin(batch)
                    write_tensors(folder / _file(b), each(b, batch, watch))
            if some:
                watch.sites = {name: site for name, site in sites.items() if name in watch.layers}
            tensors, listing = pack(watch.result(alike=False))
            write_tensors(folder / SUMS, tensors)
            return {"statistics": listing}

        self.steps.run(name, make)

    def _read(self, step: str, b: int) -> Tensor:
        return self.steps.tensors(step, _file(b))["x"]

    def _sums(self, step: str) -> dict[str, Stats]:
        if not self.steps.has(step):
            return {}
        listing = self.steps.figures(step)["statistics"]
        return unpack(self.steps.tensors(step, SUMS), listing)


def _file(b: int) -> str:
    return f"{b}.safetensors"


def _gradient(x: Tensor, what: str) -> Tensor:
    if x.grad is None:
        raise CalibrationError(f"the loss does not depend on what enters {what}; use other labels.")
    return finite(x.grad, f"{what} makes gradients")


def finite(x: Tensor, what: str) -> Tensor:
    """Return what the run of a model made.

    Raises:
        CalibrationError: if it holds NaN or infinity.
    """
    if not is_finite(x):
        raise CalibrationError(f"{what} that are not finite; use float32, or look at the weights.")
    return x
