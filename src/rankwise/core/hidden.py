"""Which parameters are hidden matrices, and which are not: the rule by which optimisers tell them apart."""

from dataclasses import dataclass

from torch import nn

from .integer_weights import ChangingWeight
from .stacks import stacks_of
from .surgery import Site, StructuredLinear, select
from .views import SliceView, TransposedView


@dataclass(frozen=True)
class Form:
    """How a parameter holds matrices.

    Args:
        batched: several of them, along its first axis.
        transposed: each as (in, out).
    """

    batched: bool = False
    transposed: bool = False


def hidden_matrices(model: nn.Module) -> dict[str, Form]:
    """Name the parameters that are matrices inside a model: what linear layers and convolutions multiply with.

    A parameter is one if it has two or more dimensions, asks for a gradient, and belongs to a layer that
    ``rankwise.inspect`` looks at, structured ones and those that train as integers included. So attention and MLP
    matrices are, and the stacked matrices of a mixture's experts; embeddings, a table that is tied to one, the
    output head, norms and biases are not.

    Raises:
        ValueError: if there is none.

    >>> net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    >>> hidden_matrices(net)
    {'1.weight': Form(batched=False, transposed=False)}
    """
    inside = {id(part.change): Form() for part in model.modules() if isinstance(part, ChangingWeight)}
    try:
        sites = [*select(model, compressed=True).values()]
    except ValueError:
        if not inside:  # else all of them train as integers
            raise
        sites = []
    for site in sites:
        if site.part is not None:
            inside[id(getattr(site.layer, site.part[0]))] = _form(site)
        else:
            inside |= {id(p): _form(site) for p in site.layer.parameters()}
    return {
        name: inside[id(p)]
        for name, p in model.named_parameters()
        if id(p) in inside and p.ndim >= 2 and p.requires_grad
    }


def biases_of_stacks(model: nn.Module) -> set[str]:
    """Name the 2-D parameters beside stacks of matrices that have a vector for each of these."""
    found = set()
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        counts = {len(own[name]) for name in stacks_of(module)}
        biases = (name for name, p in own.items() if p.ndim == 2 and len(p) in counts)
        found |= {f"{path}.{name}".removeprefix(".") for name in biases}
    return found


def _form(site: Site) -> Form:
    """How a matrix is kept; structured ones are (out, in) everywhere."""
    view = site.view
    reverse = isinstance(view, TransposedView) or (isinstance(view, SliceView) and view.transposed)
    return Form(site.part is not None, reverse and not isinstance(site.layer, StructuredLinear))
