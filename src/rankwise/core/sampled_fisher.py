"""The Fisher matrix as a sum over rows that stand for samples, and gradients divided by it."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..linalg import KhatriRao, Sharing, damped_root, solve_root
from .preconditioner import Curvature, Size


def stored(each: Iterable[KhatriRao]) -> dict[str, Tensor]:
    """Return the rows of each layer of a block under the names that the other functions expect."""
    found = {}
    for i, rows in enumerate(each):
        found |= {f"inputs.{i}": rows.inputs, f"gradients.{i}": rows.gradients}
    return found


def root_of(curvature: Curvature, damping: float, shapes: Sequence[tuple[int, int]]) -> Curvature:
    """Return the Cholesky factor of the kernel of the rows, damped.

    The Fisher matrix is U S U' / N, where S is L L' for the tensor ``mix`` L (R, R), or the identity without it,
    and N is the tensor ``samples``. The kernel is L'U'U L / N.
    """
    kernel = torch.stack([rows.gram() for rows in _rows(curvature, shapes)]).sum(0)
    if "mix" in curvature:
        kernel = curvature["mix"].mT @ kernel @ curvature["mix"]
    root = damped_root(kernel / curvature["samples"], damping)
    return {"root": root, "damping": torch.tensor(damping, dtype=torch.float64)}


def divided(gradients: Sequence[Tensor], curvature: Curvature) -> list[Tensor]:
    """Return (U S U' / N + a I)^-1 V for the gradients V of a block, with the damping a of the root.

    It is (V - U L (L'U'U L / N + a I)^-1 L'U'V / N) / a (Sherman, Morrison and Woodbury).
    """
    each = _rows(curvature, [(v.shape[0], v.shape[1]) for v in gradients])
    weights = torch.stack([u.products(v) for u, v in zip(each, gradients, strict=True)]).sum(0)
    mix = curvature.get("mix")
    weights = weights if mix is None else mix.mT @ weights
    weights = solve_root(curvature["root"], weights) / curvature["samples"]
    weights = weights if mix is None else mix @ weights
    within = curvature["damping"]
    return [(v - u.combination(weights)) / within for u, v in zip(each, gradients, strict=True)]


def row_length(shapes: Sequence[tuple[int, int]]) -> float:
    """Return how much work an entry of a kernel is."""
    return float(sum(m + n for m, n in shapes))


def shared_bytes(size: Size, sharing: Sharing) -> tuple[int, int]:
    """Return how many rows the samples of a layer become, and the bytes of each."""
    (m, n), (rows, positions) = size.shape, (size.samples, size.positions)
    with torch.device("meta"):
        gradients = torch.empty(rows, positions, m, dtype=size.dtype)
        inputs = torch.empty(rows, positions, *(() if size.tokens else (n,)), dtype=size.dtype)
    each = sharing(KhatriRao(inputs.long() if size.tokens else inputs, gradients, n))
    return len(each), (each.inputs.nbytes + each.gradients.nbytes) // max(len(each), 1)


def _rows(curvature: Curvature, shapes: Sequence[tuple[int, int]]) -> list[KhatriRao]:
    """The rows of all processes, by layers."""
    return [
        KhatriRao(curvature[f"inputs.{i}"], curvature[f"gradients.{i}"], n) for i, (_, n) in enumerate(shapes)
    ]
