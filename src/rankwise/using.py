"""The verbs for several adapters around the same matrices: which there are, which are in use, which goes."""

from collections.abc import Mapping
from types import TracebackType

from torch import nn

from .core.several import Choice, check_known, choose, chosen, drop, named, put
from .core.surgery import refuse_followed
from .matrices.several import Rows, Weights, without


class Using:
    """Puts back what was in use before :func:`use`, at the end of a ``with``."""

    def __init__(self, model: nn.Module, before: Mapping[str, Weights | Rows]) -> None:
        self._model, self._before = model, before

    def __enter__(self) -> None:
        """Leave what is in use."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put it back."""
        put(self._model, self._before)


def use(model: nn.Module, choice: Choice) -> Using:
    """Say which of a model's adapters compute: from now on, or within a ``with``.

    ::

        rankwise.load_adapter(model, "poet-folder", name="poet")
        rankwise.load_adapter(model, "coder-folder", name="coder")
        rankwise.use(model, "poet")                              # alone
        rankwise.use(model, {"poet": 0.7, "coder": 0.3})         # W + 0.7 (E_poet - W) + 0.3 (E_coder - W)
        rankwise.use(model, None)                                # none: the model itself
        with rankwise.use(model, ["poet", "coder", None]):       # one for each row of a batch of three
            model(ids)

    What is in use trains, and nothing else of the adapters does. The weighted sum is that of the changes of the
    weights, exact for every kind of adapter; :func:`rankwise.fold` and :func:`rankwise.save` take it as one
    adapter, and a sum of low-rank ones is one of the summed rank.

    With rows, the products with W are computed once for all, and each adapter on its own rows alone. Rows are the
    first axis of the inputs of every adapted layer, so generation works too; a search with k beams makes k
    neighbours of each row: repeat each entry k times. The experts of mixtures see tokens of any row, and refuse.

    Args:
        model: has adapters with names.
        choice: a name; weights by name; None for no adapter; or a sequence of these, one for each row. In layers
            where an adapter does not stand it changes nothing.

    Returns:
        what puts back at the end of a ``with`` what was in use.

    Raises:
        ValueError: if there is no such adapter, or rows cannot choose because a layer is an expert. A batch of
            another number of rows raises when it runs.

    >>> import torch, rankwise
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> for name in ("poet", "coder"):
    ...     _ = rankwise.adapt(net, rankwise.adapters.Lora(rank=2), name=name)
    >>> with rankwise.use(net, ["poet", None, "coder"]):
    ...     net(torch.ones(3, 8)).shape
    torch.Size([3, 2])
    """
    before = chosen(model)
    choose(model, choice)
    return Using(model, before)


def adapters_of(model: nn.Module) -> dict[str, list[str]]:
    """Return the names of a model's adapters, each with the layers that it changes; in the order they came in."""
    return named(model)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter with a name off a model, in place; layers that have no other are what they were.

    What else is in use stays so; if it was this one alone, no adapter is.

    Raises:
        ValueError: if there is none of this name, or a schedule acts on the model's adapters.
    """
    check_known(model, name)
    refuse_followed(model)
    before = chosen(model)
    put(model, {path: without(choice, name) for path, choice in before.items()})
    drop(model, name)
