"""How much memory the process has needed so far, and what training will need."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .optimizer import Optimizer


def peak_memory_bytes(device: torch.device | str = "cpu") -> int:
    """Return the largest memory the process has held.

    Args:
        device: on a CUDA device, what PyTorch allocated there; else the resident memory of the process.
            Both are since the start, or since the last reset of CUDA's figure.

    >>> peak_memory_bytes() > 0
    True
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil  # accelerate brings it

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kilobytes, but bytes on macOS


def memory_bytes(device: torch.device | str = "cpu") -> int:
    """Return the memory that the process holds now, in the sense of :func:`peak_memory_bytes`.

    >>> memory_bytes() > 0
    True
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device)
    import psutil  # accelerate brings it

    return psutil.Process().memory_info().rss


def reset_peak_memory(device: torch.device | str = "cpu") -> bool:
    """Have :func:`peak_memory_bytes` count from now on; returns whether the system allows that."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False  # not Linux, or not allowed
    return True


def held_bytes(model: nn.Module) -> int:
    """Count the bytes of all parameters and buffers, shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({_place(t): min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors}.values())


def gradient_bytes(model: nn.Module) -> int:
    """Count the bytes of the gradients of all parameters that train."""
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


def layerwise_gradient_bytes(model: nn.Module) -> int:
    """Count the bytes of gradients that stand beside each other where each is freed once it is complete.

    That is one of them, and those of parameters with several places, such as tied embeddings, which are complete
    only when all places have been passed.
    """
    names: dict[int, int] = {}
    sizes: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names[id(parameter)] = names.get(id(parameter), 0) + 1
            sizes[id(parameter)] = parameter.nbytes
    tied = sum(sizes[key] for key, count in names.items() if count > 1)
    return tied + max((sizes[key] for key, count in names.items() if count == 1), default=0)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int | None:
    """Count the bytes of what an optimiser will keep, from the shapes of its parameters.

    :class:`rankwise.Optimizer` counts exactly; for others a step is tried on parameters without values.

    Returns:
        the bytes, or None where such a step is not possible.

    >>> weight = nn.Parameter(torch.zeros(10))
    >>> optimizer_bytes(torch.optim.AdamW([weight])), optimizer_bytes(torch.optim.SGD([weight]))
    (84, 0)
    """
    if isinstance(optimizer, Optimizer):
        return optimizer.state_bytes()
    groups = []
    for group in optimizer.param_groups:
        shapes = [nn.Parameter(torch.empty_like(p, device="meta")) for p in group["params"]]
        for shape in shapes:
            shape.grad = torch.empty_like(shape)
        groups.append({**group, "params": shapes})
    try:
        make: Any = type(optimizer)
        probe = make(groups)
        probe.step()
    except Exception:  # of any kind: it asks for values, for other arguments, or to be told something first
        return None
    kept = [value for state in probe.state.values() for value in state.values()]
    return sum(value.nbytes for value in kept if isinstance(value, Tensor))


def activation_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Measure what one call keeps for the backward pass, the model's own tensors not counted.

    What is only needed for a moment does not count, nor what checkpointing computes again.
    """
    own = {_place(tensor)[0] for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    with _watching(lambda tensor: kept.setdefault(_place(tensor)[0], tensor.untyped_storage().nbytes())):
        output = forward()  # alive until all is counted, so that no place is counted twice
    del output
    return sum(size for place, size in kept.items() if place not in own)


def training_bytes(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    forward: Callable[[], object],
    *,
    gradients: int | None = None,
) -> dict[str, int | None]:
    """Predict what training will hold: its parts, and their sum ``predicted``.

    Args:
        model: that trains.
        optimizer: trains it.
        forward: computes the loss of the largest batch. Random numbers that it draws are drawn again later.
        gradients: bytes of those that stand beside each other; None means all.
    """
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        parts = {
            "weights": held_bytes(model),
            "gradients": gradient_bytes(model) if gradients is None else gradients,
            "optimizer": optimizer_bytes(optimizer),
            "activations": activation_bytes(model, forward),
        }
    return {**parts, "predicted": sum(size or 0 for size in parts.values())}


@contextlib.contextmanager
def _watching(note: Callable[[Tensor], object]) -> Iterator[None]:
    def pack(tensor: Tensor) -> Tensor:
        note(tensor)
        return tensor.detach()  # a result that its own node keeps would keep the node, for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.numel()
