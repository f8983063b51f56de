"""Round a matrix to grids of few values, group by group of its columns."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .metric import Metric

BLOCK = 64  # columns whose errors are moved on together
SHRINKS = 16  # how many ranges are tried for each group, from all of it down to about half


@dataclass(frozen=True)
class Rounded:
    """Codes (m, n) uint8, and scale and offset (m, ceil(n / group)): a value is ``scale * code + offset``."""

    codes: Tensor
    scale: Tensor
    offset: Tensor
    group: int

    def dense(self) -> Tensor:
        """Return the values, (m, n), rounded once."""
        n = self.codes.shape[1]
        scale, offset = (t.repeat_interleave(self.group, 1)[:, :n] for t in (self.scale, self.offset))
        return torch.addcmul(offset, scale, self.codes.to(scale.dtype))


def round_to_grid(
    weight: Tensor, inputs: Metric, *, bits: int, group: int, dtype: torch.dtype, feedback: bool = True
) -> Rounded:
    """Round a matrix to ``bits``-bit integers so that tr(D C D') of the change D stays small.

    Each group of columns of a row first gets its range: of several, the one with the least error of rounding to
    nearest. Then columns are rounded one after another, those with the largest inputs first. With ``feedback``
    the error of each is made up for, as well as C allows, by the columns that are still to come (successive
    interference cancellation, Babai's nearest plane); without, every number goes to the nearest value.

    Args:
        weight: (m, n).
        inputs: C (n, n), a diagonal (n,), or the identity.
        bits: 1 ... 8.
        group: how many columns share a scale and an offset.
        dtype: in which scale and offset are stored; codes are chosen for the rounded ones.
        feedback: whether errors are made up for.

    Returns:
        the codes and their grids, the latter in ``dtype``.

    References: Frantar et al., "GPTQ", ICLR 2023, arXiv 2210.17323 (there the ranges are not searched); columns
        in the order of diag C over ranges chosen beforehand are its code's "act-order" with "static groups".
    """
    m, n = weight.shape
    metric = inputs if feedback else Metric(inputs.diagonal(n).to(weight.device))
    order, upper = _elimination(metric, n, weight.device)
    importance = upper.square().sum(0)[order.argsort()].reciprocal()  # 1 / C^-1_jj: the rest is made up for
    left = weight.double()
    scale, offset = choose_grids(left, importance, bits, group, dtype)
    left = left[:, order]
    codes = torch.empty(m, n, dtype=torch.uint8, device=weight.device)
    for low in range(0, n, BLOCK):
        high = min(low + BLOCK, n)
        errors = torch.zeros(m, high - low, dtype=left.dtype, device=weight.device)
        for j in range(low, high):
            column = int(order[j])
            a, b = scale[:, column // group], offset[:, column // group]
            code = nearest_codes(left[:, j], a, b, bits)
            codes[:, column] = code.to(torch.uint8)
            if feedback:
                errors[:, j - low] = (left[:, j] - (a * code + b)) / upper[j, j]
                left[:, j + 1 : high].addr_(errors[:, j - low], upper[j, j + 1 : high], alpha=-1)
        if feedback:
            left[:, high:].addmm_(errors, upper[low:high, high:], alpha=-1)
    return Rounded(codes, scale.to(dtype), offset.to(dtype), group)


def _elimination(inputs: Metric, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the order of the columns, by diag C, and how their errors move.

    The second is upper triangular U (n, n) with U' U = C^-1, both in the order: row j, divided by U_jj, says how
    the error of a column moves to the later ones.
    """
    root = inputs.root
    if root is None or root.dim() == 1:
        root = torch.ones(n, dtype=torch.float64, device=device) if root is None else root
        order = root.argsort(descending=True, stable=True)
        return order, root[order].reciprocal().diag()
    order = root.square().sum(1).argsort(descending=True, stable=True)
    return order, torch.linalg.cholesky(torch.cholesky_inverse(root)[order][:, order], upper=True)


def choose_grids(
    weight: Tensor, importance: Tensor, bits: int, group: int, dtype: torch.dtype, ranges: int = SHRINKS
) -> tuple[Tensor, Tensor]:
    """Choose a grid of 2^bits values for each group of columns of a row.

    It spans the range of the group, or the middle of it, whichever errs least when rounded to nearest.

    Args:
        weight: (m, n), float64.
        importance: (n,) of a squared error in each column.
        bits: 1 ... 8.
        group: how many columns share a grid.
        dtype: to whose numbers scale and offset are rounded.
        ranges: how many are tried, from all of the range down.

    Returns:
        scale and offset, (m, ceil(n / group)) float64.
    """
    m, n = weight.shape
    groups = -(-n // group)
    pad = groups * group - n
    repeated = torch.cat([weight, weight[:, -1:].expand(m, pad)], 1)  # what is repeated widens no range
    values = repeated.view(m, groups, group)
    weights = torch.cat([importance, importance.new_zeros(pad)]).view(groups, group)
    low, high = values.amin(-1), values.amax(-1)
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # above zero
    best, scale, offset = torch.full_like(low, torch.inf), low, low
    for i in range(ranges):
        cut = (high - low) * i / (4 * SHRINKS)
        a = ((high - low - 2 * cut) / (2**bits - 1)).to(dtype).double()
        a = torch.where(high > low, a.clamp_min(least), 1.0)
        b = (low + cut).to(dtype).double()
        rounded = a[..., None] * nearest_codes(values, a[..., None], b[..., None], bits) + b[..., None]
        error = ((values - rounded).square() * weights).sum(-1)
        better = error < best
        best, scale, offset = (torch.where(better, *pair) for pair in ((error, best), (a, scale), (b, offset)))
    return scale, offset


def nearest_codes(values: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """Return the codes, in floating point, whose ``scale * code + offset`` are nearest to values."""
    return ((values - offset) / scale).round().clamp(0, 2**bits - 1)
