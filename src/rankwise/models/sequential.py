"""Fits the layers of a model one after the other, on what those before them make once they are compressed."""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.modes import frozen, without_cache
from ..core.progress import track
from ..core.statistics import Batch, InputGram, Statistic
from ..core.surgery import Site, input_of, replace, set_module, unstacked
from ..core.views import View
from ..core.watch import Watch
from ..matrices import StructuredMatrix
from .blocks import Chain
from .stream import finite, parts_of

SHRINKAGE = 0.05  # of C' towards its diagonal, where a weight is aimed at the dense model's outputs
DAMPING = 1e-6  # multiple of the mean of the diagonal of C' that is added to it there

STRENGTH = 0.5  # how far weights are aimed at the dense model's outputs, where nothing else is said

Fit = Callable[[str, Tensor, Mapping[type[Statistic], Statistic]], StructuredMatrix]
"""Makes the matrix of a layer from its name, its (m, n) target and the statistics of its new inputs."""


@dataclass
class Group:
    """Layers of a block that see the same input, and its rows (t, n) in the dense model, batch by batch.

    ``aligned`` says that these are the rows of the hidden states, in the same order.
    """

    site: Site
    names: list[str]
    rows: list[Tensor] = field(default_factory=list)
    aligned: bool = True


class Sequential:
    """Runs the dense and the compressed model beside each other, block by block, and fits each group of layers.

    A layer of weight W saw inputs x; with compressed layers before it, it sees x'. The W' that makes E|W x -
    W' x'|^2 least is W + W E[(x - x') x''] C'^-1 with C' = E[x' x'']; it is approached by ``strength`` of that
    change, and approximated in the metric of C'. Layers with one input (query, key and value) are fitted
    together, and later groups of the block see their result. Layers that do not see every row once, such as
    experts, are made from the dense model's inputs, last in their block. In memory are the hidden states of all
    tokens in both models, and the inputs of one block's layers.

    Args:
        chain: of the dense model, which stays as it is.
        sites: all selected layers.
        needs: the statistics that are wanted of new inputs.
        strength: 0 fits to the new inputs with the old weight as the target, 1 aims at the dense outputs.

    Raises:
        ValueError: if an argument is wrong, or a weight stands in several blocks.

    References: the target is that of Sinha and Fleuret, "AA-SVD", 2026, arXiv 2604.02119, without its refinement
        of whole blocks; a strength below one is that of Arai and Ichikawa, "Quantization error propagation",
        NeurIPS 2025, arXiv 2504.09629.
    """

    def __init__(
        self,
        chain: Chain,
        sites: Mapping[str, Site],
        needs: Collection[type[Statistic]],
        strength: float,
    ) -> None:
        if not 0 <= strength <= 1:
            raise ValueError(f"sequential must be True, False, or a number from 0 to 1, got {strength}.")
        self.chain, self.model, self.strength = chain, chain.model, strength
        self.batches: Sequence[Batch] = ()
        self.needs = {InputGram, *(need for need in needs if need.side == "input")}
        self.parts = parts_of(chain, sites)
        self.watch = Watch({}, ())

    def take(self, batches: Sequence[Batch]) -> None:
        """Take the data.

        Raises:
            ValueError: if there is none.
        """
        if not batches:
            raise ValueError(
                "a sequential compression runs the data again; give the data, or what calibrate returned."
            )
        self.batches = batches

    def learn(self) -> None:
        """Look at one pass, and check that the model is a chain of blocks.

        Raises:
            ValueError: if it is not.
        """
        with frozen(self.model), torch.no_grad(), without_cache(self.model):
            self.chain.learn(self.batches[0])

    def fit(self, chosen: Collection[str], fit: Fit) -> dict[str, StructuredMatrix]:
        """Fit the chosen layers that are in blocks; those outside are left out. :meth:`learn` comes first."""
        found: dict[str, StructuredMatrix] = {}
        with frozen(self.model), torch.no_grad(), without_cache(self.model):
            dense = now = [self.chain.enter(batch) for batch in self.batches]
            for i in track(range(len(self.chain.names)), "sequential"):
                made, dense, now = self.block(i, chosen, fit, dense, now)
                found |= made
        return found

    def block(
        self, i: int, chosen: Collection[str], fit: Fit, dense: Sequence[Tensor], now: Sequence[Tensor]
    ) -> tuple[dict[str, StructuredMatrix], list[Tensor], list[Tensor]]:
        """Fit the chosen layers of block i.

        Args:
            i: number of the block.
            chosen: names of layers.
            fit: makes their matrices.
            dense: what enters the block in the dense model, batch by batch.
            now: what enters it in the compressed model; the same list where nothing before is compressed.

        Returns:
            the matrices, and what leaves the block in both models.

        Raises:
            CalibrationError: if something in the block is not finite.
        """
        sites = {name: site for name, site in self.parts[self.chain.names[i]].items() if name in chosen}
        found: dict[str, StructuredMatrix] = {}

        def put(name: str, weight: Tensor, new: Mapping[type[Statistic], Statistic]) -> None:
            found[name] = fit(name, weight, new)
            replace(self.model, sites[name], found[name])

        with unstacked(self.model, sites.values()), self._restored(sites.values()):
            groups, after = self._inputs(i, sites, dense)
            for group in groups:
                new, change = self._compare(i, group, now)
                for name in group.names:
                    weight = sites[name].weight
                    target = weight if change is None else weight + (weight.double() @ change).to(weight.dtype)
                    put(name, target, new)
            for name in [name for name in sites if name not in found]:
                put(name, sites[name].weight, {})
            same = not found and now is dense
            return found, after, after if same else self._made(i, now, "compressed ")

    def _made(self, i: int, hidden: Iterable[Tensor], how: str = "") -> list[Tensor]:
        """Return what leaves a block, as it is now, batch by batch."""
        what = f"{how}block {self.chain.names[i]} makes hidden states"
        return [finite(self._run(i, b, x), what) for b, x in enumerate(hidden)]

    def _run(self, i: int, b: int, x: Tensor) -> Tensor:
        return self.chain.block(i, self.batches[b], x)

    def _inputs(
        self, i: int, sites: Mapping[str, Site], hidden: Sequence[Tensor]
    ) -> tuple[list[Group], list[Tensor]]:
        """Run a dense block; return what its layers saw, in their order, and what it made."""
        groups: dict[str, Group] = {}
        seen: dict[tuple[int, int, View], tuple[Tensor, str]] = {}  # of this batch; the tensor is kept alive
        shape = [torch.Size()]  # of the hidden states of this batch, without features

        def hook(name: str, site: Site) -> Callable[..., None]:
            def fill(_: nn.Module, inputs: Any, options: Any) -> None:
                x = input_of(inputs, options)
                key = id(x), x._version, site.view
                if key in seen:
                    leader = groups[seen[key][1]]
                    if name not in leader.names:
                        leader.names.append(name)
                    return
                seen[key] = x, name
                group = groups.setdefault(name, Group(site, [name]))
                group.aligned &= x.shape[:-1] == shape[0]
                group.rows.append(self._rows(site, x))

            return fill

        def each() -> Iterator[Tensor]:
            for batch, x in zip(self.batches, hidden, strict=True):
                seen.clear()
                shape[0] = x.shape[:-1]
                self.watch.begin(batch)
                yield x

        with contextlib.ExitStack() as hooks:
            for name, site in sites.items():
                if len(site.names) > 1 or site.part is not None:
                    continue  # a weight with several inputs, or one of a mixture
                layer = self.model.get_submodule(name)
                hooks.enter_context(layer.register_forward_pre_hook(hook(name, site), with_kwargs=True))
            made = self._made(i, each())
        return [g for g in groups.values() if g.aligned and len(g.rows) == len(hidden)], made

    def _compare(
        self, i: int, group: Group, hidden: Sequence[Tensor]
    ) -> tuple[dict[type[Statistic], Statistic], Tensor | None]:
        """Return the statistics of a group's new inputs, and what aims its weights at the dense outputs.

        The latter is ``strength`` E[(x - x') x''] C'^-1, (n, n).
        """
        m, n = group.site.weight.shape
        new = {need: need(m, n, hidden[0].device) for need in self.needs}
        change = torch.zeros(n, n, device=hidden[0].device)

        def stop(_: nn.Module, inputs: Any, options: Any) -> None:
            raise _Seen(self._rows(group.site, input_of(inputs, options)))

        handle = self.model.get_submodule(group.names[0]).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            for b, x in enumerate(hidden):
                self.watch.begin(self.batches[b])
                try:
                    self._run(i, b, x)
                except _Seen as seen:
                    rows = finite(seen.rows.float(), f"the compressed model makes inputs of {group.names[0]}")
                    for statistic in new.values():
                        statistic.update(rows)
                    change.addmm_((group.rows[b].float() - rows).mT, rows)
        finally:
            handle.remove()
        if self.strength == 0 or not bool(change.any()):
            return new, None
        moment = new[InputGram].value()
        diagonal = moment.diagonal()
        shrunk = moment.lerp(diagonal.diag(), SHRINKAGE) + (DAMPING * diagonal.mean()).expand(n).diag()
        change = change.double() / new[InputGram].count
        return new, self.strength * torch.linalg.solve(shrunk, change, left=False)

    def _rows(self, site: Site, x: Tensor) -> Tensor:
        return self.watch.padding.of(x).rows(site.view.inputs(x.detach()))

    @contextlib.contextmanager
    def _restored(self, sites: Iterable[Site]) -> Iterator[None]:
        """Put the layers back that are replaced inside."""
        before = {name: self.model.get_submodule(name) for site in sites for name in site.names}
        try:
            yield
        finally:
            for name, layer in before.items():
                set_module(self.model, name, layer)


def strength_of(sequential: bool | float) -> float:
    """Return the strength that a word or a number means."""
    return STRENGTH if sequential is True else float(sequential)


class _Seen(Exception):
    """Ends a forward pass where the rows that it is for are there."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows
