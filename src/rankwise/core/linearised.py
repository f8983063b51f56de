"""What a model computes, near the point at which it was computed, as a linear map that is never formed."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .labels import unpadded
from .modes import frozen
from .statistics import Batch
from .watch import call_of


class Linearised:
    """The derivative J of an output, flattened to (m,), by inputs flattened to (n,), as products.

    J v is the derivative by u of J' u, which is linear in u: any operation that can be differentiated twice will
    do, also those without a forward mode.

    Args:
        output: of any shape.
        inputs: tensors that it was computed from, with gradients.

    Raises:
        ValueError: if one of them is in half precision, which leaves no digits of a spectrum.
    """

    def __init__(self, output: Tensor, inputs: Sequence[Tensor]) -> None:
        self.output, self.inputs = output, tuple(inputs)
        half = next((each.dtype for each in (output, *inputs) if each.dtype.itemsize < 4), None)
        if half is not None:
            raise ValueError(
                f"derivatives in {half} are too rough for a spectrum; copy the model to float32 with "
                "copy.deepcopy(model).float(), and leave autocast."
            )
        self.u = torch.zeros_like(output, requires_grad=True)
        self.pulled = torch.autograd.grad(output, self.inputs, self.u, create_graph=True, materialize_grads=True)

    def push(self, v: Tensor) -> Tensor:
        """Return J v in the shape of the output, for v (n,)."""
        parts = v.split([each.numel() for each in self.inputs])
        pairs = [
            (pulled, part.view_as(pulled))
            for pulled, part in zip(self.pulled, parts, strict=True)
            if pulled.requires_grad
        ]
        if not pairs:
            return torch.zeros_like(self.output)
        left, right = zip(*pairs, strict=True)
        return torch.autograd.grad(left, self.u, right, retain_graph=True, materialize_grads=True)[0]

    def pull(self, u: Tensor) -> Tensor:
        """Return J' u (n,), for u of the shape of the output."""
        found = torch.autograd.grad(self.output, self.inputs, u, retain_graph=True, materialize_grads=True)
        return torch.cat([each.flatten() for each in found])


@contextlib.contextmanager
def differentiable(model: nn.Module, names: Sequence[str] | None = None) -> Iterator[dict[str, nn.Parameter]]:
    """Put a model in evaluation mode, with gradients of some parameters, and attention that has two derivatives.

    Args:
        model: any module; its mode and its parameters' flags are put back.
        names: of ``model.named_parameters()``; None means all that are floating-point.

    Raises:
        ValueError: if there is no parameter of a name.
    """
    known = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise ValueError(f"the model has no parameter {unknown[0]!r}; see model.named_parameters().")
    with frozen(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        chosen = {name: known[name] for name in (known if names is None else names)}
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        yield chosen


def run(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """Return the output of a model, or its logits.

    Raises:
        ValueError: if there is no such tensor.
    """
    arguments, options = call_of(batch, device)
    output = model(*arguments, **options)
    found = output.get("logits") if isinstance(output, Mapping) else output
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise ValueError("the model must return a floating-point tensor, or an output with logits.")
    return found


def output_rows(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """Return the output of a model, or its logits, as rows (t, k) without padding.

    Raises:
        ValueError: if it has no rows.
    """
    output = run(model, batch, device)
    if output.dim() < 2:
        raise ValueError(f"outputs must be (..., k), with samples before, got shape {tuple(output.shape)}.")
    return unpadded(output, batch)
