"""The two factors of a layer's curvature: second moments of its inputs and of its outputs' gradients."""

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..linalg import KhatriRao, Sharing, fold_symmetric, unfold_symmetric, with_gradient
from .capture import Rows
from .preconditioner import Curvature, Size

NAMES = ("inputs", "outputs")


def factor_sums(rows: Rows, sharing: Sharing, largest_side: int) -> dict[str, Tensor]:
    """Return sum a a' and sum g g' over positions, each as one triangle, and how many positions have a gradient.

    What has no gradient, as padding, has no part in the curvature, and does not count. The factor of tokens is
    diagonal, and that of a side above ``largest_side`` is replaced by its diagonal.

    Raises:
        ValueError: if samples still have several positions after sharing.
    """
    each = sharing(rows.each)
    if each.gradients.shape[1] != 1:
        raise ValueError("factors need one position per row; take sharing=expanded or reduced.")
    gradients = each.gradients[:, 0]
    counted = with_gradient(gradients)
    return {
        "inputs": _input_sum(each, counted, largest_side),
        "outputs": _second_moment(gradients, largest_side),
        "positions": counted.sum(),
    }


def factor_means(sums: Mapping[str, Tensor], samples: int) -> dict[str, Tensor]:
    """Return A, the mean over positions, and G, the sum over a sample's positions, averaged over the samples."""
    return {"inputs": sums["inputs"] / sums["positions"].clamp_min(1), "outputs": sums["outputs"] / samples}


def average(curvature: Curvature, new: Mapping[str, Tensor], decay: float) -> None:
    """Let running averages take something in, each with the weight that it has in all.

    Where something is not finite, averages stay as they were, with a warning.
    """
    if not _finite(new):
        warnings.warn("second moments that are not finite are not taken in.", RuntimeWarning, stacklevel=2)
        return
    for name, tensor in new.items():
        if name not in curvature:
            begin_average(curvature, {name: torch.zeros_like(tensor)}, weight=0.0)
        curvature[name] = torch.lerp(tensor, curvature[name], decay)
        curvature[f"{name}.weight"] = 1 + decay * (curvature[f"{name}.weight"] - 1)


def begin_average(curvature: Curvature, start: Mapping[str, Tensor], weight: float) -> None:
    """Let averages begin with something: weight 0 for nothing, which is corrected later, 1 for a real start."""
    for name, tensor in start.items():
        curvature[name] = tensor
        curvature[f"{name}.weight"] = torch.tensor(weight, dtype=torch.float64)


def averaged(curvature: Curvature, name: str) -> Tensor:
    """Return an average with its bias corrected."""
    return curvature[name] / curvature[f"{name}.weight"]


def update_factors(
    curvature: Curvature, sums: Mapping[str, Tensor], samples: int, decay: float, identity_start: bool
) -> None:
    """Let the running averages of both factors take in a batch.

    Raises:
        ValueError: if the first is not finite.
    """
    new = factor_means(sums, samples)
    if "inputs" not in curvature and not _finite(new):
        raise ValueError("second moments of a layer are not finite, though its gradient is: scale the loss down.")
    if "inputs" not in curvature and identity_start:
        begin_average(curvature, {name: _identity(tensor) for name, tensor in new.items()}, weight=1.0)
    average(curvature, new, decay)


def factors(curvature: Curvature, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return A, (n, n) or its diagonal (n,), and G, (m, m) or (m,)."""
    inputs, outputs = (averaged(curvature, name) for name in NAMES)
    return _whole(inputs, shape[1]), _whole(outputs, shape[0])


def found_or_kept(find: Callable[[], Curvature], curvature: Curvature, sign: str) -> Curvature:
    """Return what is found; where the decomposition fails, warn and keep what is there under the name ``sign``.

    Raises:
        ArithmeticError: if it fails and there is nothing.
    """
    try:
        return find()
    except ArithmeticError as error:
        if sign not in curvature:
            raise
        warnings.warn(f"{error} The previous one stays in use.", RuntimeWarning, stacklevel=2)
        return {}


def factor_bytes(sizes: Sequence[Size], largest_side: int) -> int:
    """Return the bytes of both factors, and of one square matrix, or diagonal, for each that a solver makes."""
    numbers = 0
    for size in sizes:
        m, n = size.shape
        for side, whole in ((m, m <= largest_side), (n, n <= largest_side and not size.tokens)):
            numbers += (side + 1) // 2 * (side + 1 + side % 2) + side**2 if whole else 2 * side
    return numbers * sizes[0].dtype.itemsize


def _input_sum(each: KhatriRao, counted: Tensor, largest_side: int) -> Tensor:
    if each.one_hot:
        return counted.new_zeros(each.width).index_add_(0, each.inputs.flatten(), counted.flatten())
    return _second_moment(each.inputs[:, 0] * counted[:, None], largest_side)


def _second_moment(rows: Tensor, largest_side: int) -> Tensor:
    """Sum x x' over rows (k, n), folded, or its diagonal (n,)."""
    return rows.square().sum(0) if rows.shape[1] > largest_side else fold_symmetric(rows.mT @ rows)


def _finite(tensors: Mapping[str, Tensor]) -> bool:
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).all())


def _whole(kept: Tensor, side: int) -> Tensor:
    return kept if kept.dim() == 1 else unfold_symmetric(kept, side)


def _identity(like: Tensor) -> Tensor:
    """The identity, kept as the other factor is; a folded one is as wide as its side or one more."""
    if like.dim() == 1:
        return torch.ones_like(like)
    return fold_symmetric(torch.eye(like.shape[1] - 1, dtype=like.dtype, device=like.device))
