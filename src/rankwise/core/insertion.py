"""Where the blocks of a model write into its stream, and how modules are put there."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator, Tensor, nn

from .extended import extended
from .methods import BlockAdapter
from .surgery import Site, StructuredLinear, Where, put_behind, select, sizes_of
from .views import LinearView


def insert(model: nn.Module, method: BlockAdapter, where: Where | None, seed: int) -> list[dict[str, Any]]:
    """Put modules behind layers, freeze all else, and return a row of a report for each layer.

    Args:
        model: changed in place.
        method: makes the modules.
        where: chooses linear layers; None takes the :func:`writers`.
        seed: of all random numbers.

    Raises:
        ValueError: if there is no such layer, or one does not fit or has a module behind it already.
    """
    sites = _places(model, method, where)
    made = method.modules({name: _output_of(site) for name, site in sites.items()}, Generator().manual_seed(seed))
    model.requires_grad_(False)
    rows, seen = [], set()
    for name, site in sites.items():
        put_behind(model, site, made[name], method.lr)
        new = {id(p): p.numel() for p in made[name].parameters() if id(p) not in seen}
        seen |= new.keys()
        rows.append({"name": name, "shape": list(sizes_of(site)), "rank": None, "trained": sum(new.values())})
    return rows


def writers(model: nn.Module) -> list[dict[str, Site]]:
    """Return for each block of a model the linear layers that write into its stream, in order.

    Blocks are the members of the outermost lists of modules; their width is that of the inputs of their first
    linear layer. In each part of a block, such as attention or feed-forward, the last linear layer is the one,
    if its outputs are as wide. Nothing here knows a name of a layer; experts in 3-D parameters are not found.

    Raises:
        ValueError: if there is none.
    """
    linear = {
        name: site
        for name, site in select(model, lambda *_: True, compressed=True).items()
        if site.part is None and isinstance(site.view, LinearView)
    }
    found = []
    for path, block in _blocks(model):
        inside = [name for name in linear if name.startswith(f"{path}.")]
        if not inside:
            continue
        width, last = sizes_of(linear[inside[0]])[1], {}
        for part in _parts(path, block):
            own = [name for name in inside if f"{name}.".startswith(f"{part}.")]
            if own and sizes_of(linear[own[-1]])[0] == width:
                last[own[-1]] = linear[own[-1]]
        found.append(last)
    if not any(found):
        raise ValueError(
            f"{type(model).__name__} has no blocks with a linear layer as wide as their inputs; choose layers "
            "with 'where'."
        )
    return found


def _places(model: nn.Module, method: BlockAdapter, where: Where | None) -> dict[str, Site]:
    """Return the linear layers that modules are put behind."""
    if where is None:
        blocks = [list(block.items()) for block in writers(model)]
        sites = dict(itertools.chain(*(block[-1:] if method.last else block for block in blocks)))
    else:
        sites = select(model, where, compressed=True)
    behind = {f"{name}.layer": name for name in extended(model)}
    for name, site in sites.items():
        if site.part is not None or not isinstance(site.view, LinearView):
            raise ValueError(f"layer {name} is no linear layer that a module can stand behind; leave it out.")
        if name in behind:
            raise ValueError(f"layer {behind[name]} has a module behind it already.")
    return sites


def _output_of(site: Site) -> Tensor:
    """Return (m,) numbers of the type of a layer's outputs, where they are."""
    like: Any = site.layer.matrix if isinstance(site.layer, StructuredLinear) else site.weight
    return torch.empty(sizes_of(site)[0], dtype=like.dtype, device=like.device)


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    lists: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists.append(name)
            yield from ((f"{name}.{i}", block) for i, block in enumerate(module))


def _parts(path: str, block: nn.Module) -> Iterator[str]:
    """Yield the paths of a block's parts, seeing through lists."""
    for name, child in block.named_children():
        if isinstance(child, nn.ModuleList):
            yield from (f"{path}.{name}.{i}" for i in range(len(child)))
        else:
            yield f"{path}.{name}"
