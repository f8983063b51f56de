"""Which parameters are hidden matrices, and which are not: the rule by which optimisers tell them apart."""

from torch import nn

from .integer_weights import ChangingWeight
from .surgery import select


def hidden_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the matrices inside a model: what linear layers and convolutions multiply with.

    A parameter is one if it has two or more dimensions, asks for a gradient, and belongs to a layer that
    ``rankwise.inspect`` looks at, structured ones and those that train as integers included. So attention and MLP
    matrices are; embeddings, a table that is tied to one, the output head, norms and biases are not. The stacked
    matrices of a mixture's experts, which are 3-D parameters, are not either, since they are several matrices in
    one.

    Raises:
        ValueError: if there is none.

    >>> net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    >>> list(hidden_matrices(net))
    ['1.weight']
    """
    inside = {id(part.change) for part in model.modules() if isinstance(part, ChangingWeight)}
    try:
        sites = [*select(model, compressed=True).values()]
    except ValueError:
        if not inside:  # else all of them train as integers
            raise
        sites = []
    inside |= {id(p) for site in sites if site.part is None for p in site.layer.parameters()}
    return {
        name: p for name, p in model.named_parameters() if id(p) in inside and p.ndim >= 2 and p.requires_grad
    }
