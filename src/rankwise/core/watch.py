"""One pass over the data that fills the statistics of all layers."""

import contextlib
import copy
import inspect
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from .errors import CalibrationError
from .finite import is_finite
from .labels import Labels, given, in_place, named, unlabelled, written
from .memory import peak_memory_bytes
from .modes import frozen, without_cache
from .padding import Paddings
from .progress import track
from .stacks import Stack, stacks
from .statistics import Batch, Statistic, Statistics, Stats, divide_alike, of_gradients
from .surgery import Site, input_of, unstacked
from .views import View


class Watch:
    """Fills the statistics of some sites while their model runs inside :meth:`on`.

    Layers may see different numbers of rows: convolutions the places of their own images, a classifier's head one
    row a sample, experts the tokens that reach them. Input statistics are means over the rows of the layer, and
    those of gradients sums over its rows divided by one number for all layers, the rows of the median one. So
    1/2 tr(S D C D') is, for each layer, the change of the whole loss per row of most layers.

    A matrix of a 3-D parameter, such as an expert's, counts for that as many rows as entered the module. Where
    every matrix is handed all rows, those that are zero did not reach it. Rows of padding, or without a label,
    cannot be told from others; they count as inputs, but the gradients of padding are zero.

    Args:
        sites: the layers to watch, from :func:`rankwise.core.surgery.select`.
        needs: the statistics to fill.
        strict: refuse layers that no data reached, rather than leave them without statistics.
    """

    def __init__(
        self, sites: Mapping[str, Site], needs: Iterable[type[Statistic]], *, strict: bool = True
    ) -> None:
        self.sites, self.needs, self.strict = sites, tuple(dict.fromkeys(needs)), strict
        self.layers: dict[str, dict[type[Statistic], Statistic]] = {}
        self.padding = Paddings()
        self.batch = -1  # its number
        self.seen: dict[tuple[int, int, View], tuple[weakref.ref[Tensor], str]] = {}
        self.leader: dict[str, str] = {}  # layer -> the first layer that saw the same input
        self.calls: Counter[str] = Counter()  # of each layer in this batch
        self.again: set[str] = set()  # layers that are called more than once in a batch, which share nothing
        self.gradients = any(need.side != "input" for need in self.needs)
        self.stacks: dict[str, str] = {}  # layer -> path of the stack that it is a matrix of
        self.entered: dict[str, int] = {}  # path of a stack -> rows that entered its module

    @contextlib.contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Have every run of the model counted; :meth:`begin` comes before each."""
        with unstacked(model, self.sites.values()), contextlib.ExitStack() as hooks:
            named = [(path, name) for name, site in self.sites.items() for path in site.names]
            places = [(model.get_submodule(path), name) for path, name in named]
            for layer, name in {id(layer): (layer, name) for layer, name in places}.values():
                hooks.enter_context(layer.register_forward_hook(self._filling(name), with_kwargs=True))
            found = dict(stacks(model))
            owners: dict[int, tuple[nn.Module, str, Stack]] = {}
            for path, name in named:
                above = path.rpartition(".")[0]
                if above in found:
                    first, stack = self.stacks.setdefault(name, above), found[above]
                    owners[id(stack)] = model.get_submodule(above.rpartition(".")[0]), first, stack
            for owner, path, stack in owners.values():
                hooks.enter_context(owner.register_forward_hook(self._counting(path, stack), with_kwargs=True))
            hooks.enter_context(self.padding.on(model))
            yield

    def begin(self, batch: Batch) -> None:
        """Start a batch; a keyword ``attention_mask`` in it marks padding, which does not count.

        A decoder beside an encoder has ``decoder_attention_mask``. Statistics of answers leave out the tokens,
        too, whose own place in a keyword ``labels`` (b, t) says -100.
        """
        self.padding.begin(batch if isinstance(batch, Mapping) else {})
        self.seen.clear()
        self.calls.clear()
        self.batch += 1
        for stats in self.layers.values():
            for statistic in stats.values():
                statistic.begin(self.batch)

    def result(self, *, alike: bool = True) -> dict[str, dict[type[Statistic], Statistic]]:
        """Return the statistics of each site; a matrix of a stack that no row reached has none.

        Args:
            alike: divide those of gradients by one number; else by the rows of each layer, as long as others are
                still to come. :func:`divide_alike` does it then.

        Raises:
            CalibrationError: if no batch reached a layer, or any matrix of a stack; unless it is strict, if none
                reached any layer.
        """
        paths = {name: self.stacks[name] for name in self.sites if name in self.stacks}
        reached = {name for name in paths if _reached(self.layers.get(name, {}))}
        alone = [name for name in self.sites if name not in paths]
        seen = [name for name in alone if name in self.layers]
        kinds = {need for need in self.needs if need.answers}
        silent = [name for name in seen if not all(self.layers[name][kind].count for kind in kinds)]
        useless = [name for name in seen if not all(each.count for each in self.layers[name].values())]
        there = reached.union(seen).difference(useless)  # the silent ones are useless, too
        if self.strict or not there:
            _refuse([name for name in alone if name not in self.layers], "never reached by the data")
            _refuse(silent, "that no token with a label other than -100 reached")
            _refuse(useless, "on which the loss does not depend")
            idle = sorted({*paths.values()} - {paths[name] for name in reached})
            _refuse(idle, "of which no matrix was reached by the data")
        for name in reached:
            for statistic in of_gradients(self.layers[name]):
                statistic.count = self.entered[paths[name]]
        found = {name: self.layers[name] if name in there else {} for name in self.sites}
        if alike:
            divide_alike(found.values())
        return found

    def _filling(self, name: str) -> Callable[..., Tensor]:
        return lambda _, inputs, options, y: self._fill(name, input_of(inputs, options), y)

    def _counting(self, path: str, stack: Stack) -> Callable[..., None]:
        """Return a hook that counts the rows that the module of a stack was given, but for padding."""

        def count(_: nn.Module, args: Any, options: Any, output: Any) -> None:
            given = [*args, *options.values()]
            x = next(value for value in given if isinstance(value, Tensor) and value.is_floating_point())
            copies = len(stack) if stack.batched else 1  # every matrix is given its own copy of all rows
            rows = x.numel() // x.shape[-1] // copies
            mask = self.padding.of(x).mask
            if mask is not None and rows == mask.numel():
                rows = int(mask.sum())
            self.entered[path] = self.entered.get(path, 0) + rows

        return count

    def _fill(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Count the input and the output of a layer; return what takes the place of the output."""
        site, padding = self.sites[name], self.padding.of(x)
        leader = self._leader(name, x)
        x = x.detach()
        if name not in self.layers:
            m, n = site.matrix.shape
            shared = self.layers.get(leader, {})
            self.layers[name] = {
                need: shared[need] if need.side == "input" and leader != name else need(m, n, x.device)
                for need in self.needs
            }
            for statistic in self.layers[name].values():
                statistic.begin(self.batch)
        stats = self.layers[name]
        inputs, both = None, any(need.side == "both" for need in self.needs)
        given = (x != 0).any(-1) if name in self.stacks else None
        if leader == name or both:
            inputs = padding.rows(site.view.inputs(x)) if given is None else x[given]
            if not is_finite(inputs):
                raise CalibrationError(
                    f"layer {name}: its inputs are not finite; use float32, or look at the weights."
                )
        for need, statistic in stats.items():
            if need.side == "input" and leader == name:
                fewer = need.answers and given is None
                statistic.update(padding.rows(site.view.inputs(x), answers=True) if fewer else inputs)
        if not self.gradients:
            return y
        leaf = not y.requires_grad
        of_gradient = (lambda g: padding.rows(site.view.outputs(g))) if given is None else (lambda g: g[given])
        self._on_gradient(name, y.requires_grad_() if leaf else y, inputs if both else None, of_gradient)
        return y.clone() if leaf else y  # what follows may work in place, which a leaf does not allow

    def _on_gradient(
        self, name: str, y: Tensor, inputs: Tensor | None, rows_of: Callable[[Tensor], Tensor]
    ) -> None:
        """Have some rows of the gradient of y counted when it comes; keep ``inputs`` until then."""

        def fill(gradient: Tensor) -> None:
            rows = rows_of(gradient)
            if not is_finite(rows):
                raise CalibrationError(f"layer {name}: its output gradients are not finite; use float32.")
            for need, statistic in self.layers[name].items():
                if need.side != "input":
                    statistic.update(inputs if need.side == "both" else None, rows)

        y.register_hook(fill)

    def _leader(self, name: str, x: Tensor) -> str:
        self.calls[name] += 1
        if self.calls[name] == 2 and name in self.leader and name not in self.again:
            self._part(name)
        if len(self.sites[name].names) > 1 or name in self.again:
            return name  # one weight with several inputs
        known = self.seen.get((id(x), x._version, self.sites[name].view))
        found = known[1] if known is not None and known[0]() is x else name
        if found == name:
            self.seen[id(x), x._version, self.sites[name].view] = (weakref.ref(x), name)
        if self.leader.setdefault(name, found) != found:
            raise CalibrationError(f"layers {name} and {self.leader[name]} share inputs in some batches only.")
        return found

    def _part(self, name: str) -> None:
        """Give a layer that is called again sums of its own; those that shared its first input go on together."""
        first = self.leader[name]
        others = [other for other, leader in self.leader.items() if leader == first and other != name]
        for need, statistic in self.layers[name].items():
            if need.side == "input" and others:
                self.layers[name][need] = copy.deepcopy(statistic)
        if first == name:
            if self.batch and others:
                raise CalibrationError(
                    f"layer {name} is called more often in some batches; leave it out with 'where'."
                )
            self.leader |= dict.fromkeys(others, next(iter(others), name))
            for key, (tensor, leader) in list(self.seen.items()):
                if leader == name and others:
                    self.seen[key] = tensor, others[0]
                elif leader == name:
                    del self.seen[key]
        self.leader[name] = name
        self.again.add(name)


def _refuse(names: Sequence[str], why: str) -> None:
    """Raise CalibrationError about layers, if there are any."""
    if names:
        few = ", ".join(names[:4]) + (f" and {len(names) - 4} others" if len(names) > 4 else "")
        raise CalibrationError(f"layers {why}: {few}; leave them out with 'where'.")


def _reached(stats: Stats) -> bool:
    """Whether something was summed: rows of zeros, as padding has for gradients, say nothing."""
    return bool(stats) and all(s.count > 0 and bool((s.sum != 0).any()) for s in stats.values())


def collect(
    model: nn.Module,
    sites: Mapping[str, Site],
    needs: Iterable[type[Statistic]],
    batches: Iterable[Batch],
    *,
    labels: Labels,
    generator: Generator,
    autocast: torch.dtype | None = None,
    total: int | None = None,
    strict: bool = True,
) -> Statistics:
    """Run a model once over some data and fill the statistics of its layers.

    Layers that see the same input tensor (query, key and value; gate and up) share one statistic of it. No
    gradient of a parameter is computed: the backward pass carries only those of the activations.

    Args:
        model: any module; its mode and its parameters' flags are the same afterwards.
        sites: the layers to watch, from :func:`rankwise.core.surgery.select`.
        needs: the statistics to fill.
        batches: what the model takes: a tensor, positional arguments, or keyword arguments. A keyword
            ``attention_mask`` marks padding, which does not count, and so does ``decoder_attention_mask`` for a
            decoder beside an encoder. Labels of the data are those called ``labels``, which go to the model, too,
            if it takes such; or, where they are asked for, the last of several arguments, which does not.
        labels: turns the model's output into the loss whose gradients are wanted, summed over tokens.
        generator: source of the labels' randomness.
        autocast: run the model in this type (for a float32 model on hardware that is faster in bfloat16).
        total: number of batches, for the progress bar.
        strict: see :class:`Watch`.

    Raises:
        CalibrationError: if there is no batch, if a layer is never reached, or where it is not strict all of
            them, or if a number is not finite.
    """
    start, watch, count = time.perf_counter(), Watch(sites, needs, strict=strict), 0
    device = next(model.parameters()).device
    cast = torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None)
    of_data = labels in (given, in_place)
    with (
        torch.inference_mode(False),
        watch.on(model),
        frozen(model),
        without_cache(model),
        torch.set_grad_enabled(watch.gradients),
    ):
        for batch in track(batches, "statistics", total):
            batch = _decoded(model, batch)
            arguments, options = call_of(fed(model, batch, of_data=of_data), device)
            watch.begin(batch)
            with cast:
                output = model(*arguments, **options)
            if watch.gradients:
                loss = labels(output, named(batch) if of_data else batch, generator)
                if loss.requires_grad:  # else no layer was reached
                    loss.backward()
            count += 1
    if count == 0:
        raise CalibrationError("the calibration data is empty; give at least one batch.")
    return Statistics(watch.result(), time.perf_counter() - start, peak_memory_bytes())


def _decoded(model: nn.Module, batch: Batch) -> Batch:
    """Give the decoder of an encoder-decoder, that is handed labels alone, what stands before them."""
    before: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if before is None or not isinstance(batch, Mapping) or "labels" not in batch or written(batch) is not batch:
        return batch
    return {**batch, "decoder_input_ids": before(labels=batch["labels"])}


def fed(model: nn.Module, batch: Batch, *, of_data: bool = False) -> Batch:
    """Return what a model is given of a batch; ``of_data`` if the last of several arguments is labels."""
    if isinstance(batch, Mapping):
        taken = inspect.signature(model.forward).parameters.values()
        all_named = any(each.kind is each.VAR_KEYWORD for each in taken)
        return batch if all_named or "labels" in {each.name for each in taken} else unlabelled(batch)
    return unlabelled(batch) if of_data else batch


def call_of(batch: Batch, device: torch.device) -> tuple[list[Any], dict[str, Any]]:
    """Return the positional and keyword arguments that feed a batch to a model on a device."""

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Tensor):
        return [move(batch)], {}
    if isinstance(batch, Mapping):
        return [], {key: move(value) for key, value in batch.items()}
    return [move(value) for value in batch], {}
