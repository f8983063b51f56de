"""Choose which inputs of a matrix it can do without, once the others take over what they tell of them."""

import torch
from torch import Tensor

from .metric import Metric

ROUND = 64  # columns whose changes of the two k x k matrices are put off and then made at once


def eliminate_columns(
    weight: Tensor, outputs: Metric, inputs: Metric, *, size: int = 1, least: int = 1
) -> tuple[Tensor, Tensor]:
    """Take groups of columns out of an (m, k) weight one by one, always the one that costs least by then.

    Without the inputs of a set the best weight on the others, K, is W C[:, K] C[K, K]^-1 (:func:`refit_columns`),
    and D, the change it makes, costs tr(S D C D') = tr(M_gg (P_gg)^-1) for one group g, where P = C^-1 and
    M = W' S W. What is left is a problem of the same kind: with B = P_g (P_gg)^-1, its P is P - P_g B', its M
    is (I - B e_g') M (I - e_g B'), and costs add up, because the error of a best weight is orthogonal to its
    inputs. So each cost is exact, the refit of all columns counted; only the order is greedy.

    The work is that of three products of k x k matrices, as columns leave in rounds.

    Args:
        weight: (m, k).
        outputs: S, (m, m).
        inputs: C, (k, k), positive definite after damping.
        size: columns of a group, which lie side by side; divides k.
        least: how many groups stay.

    Returns:
        the groups in the order in which they leave, (i,), and tr(S D C D') after each, (i + 1,), from 0.

    References: Kurtic, Frantar and Alistarh, "ZipLM: inference-aware structured pruning of language models",
        2023, arXiv 2302.04089, with S = I; Hassibi and Stork, "Second order derivatives for network pruning:
        optimal brain surgeon", 1993.

    >>> import torch
    >>> order, costs = eliminate_columns(torch.tensor([[3.0, 1.0, 2.0]]), Metric(), Metric(torch.eye(3)))
    >>> order.tolist(), costs.tolist()
    ([1, 2], [0.0, 1.0, 5.0])
    """
    groups, rest = divmod(weight.shape[1], size)
    if rest:
        raise ValueError(f"size must divide the {weight.shape[1]} columns of the weight, got {size}.")
    if not 1 <= least <= groups:
        raise ValueError(f"least must be >= 1 and <= {groups}, the number of groups, got {least}.")
    whitened = outputs.whiten(weight.double())
    m = whitened.mT @ whitened
    p = _inverse(inputs, weight.shape[1]).to(m.device)
    left = torch.arange(groups, device=m.device)
    order, costs = [], [torch.zeros((), dtype=torch.float64, device=m.device)]
    while len(left) > least:
        count = min(max(ROUND // size, 1), len(left) - least)
        gone, spent, m, p = _round(m, p, size, count)
        order.append(left[gone])
        costs.extend(costs[-1] + spent.cumsum(0))
        stay = torch.ones(len(left), dtype=torch.bool, device=m.device)
        stay[gone] = False
        left = left[stay]
    none = left.new_empty(0)
    return torch.cat([none, *order]), torch.stack(costs)


def refit_columns(weight: Tensor, inputs: Metric, kept: Tensor) -> Tensor:
    """Return the weight (m, r) on the inputs ``kept`` (r,) nearest to the (m, k) weight on all, in float64.

    It is W C[:, K] C[K, K]^-1, whatever the metric of the outputs.
    """
    weight, moment = weight.double(), inputs.damped
    if moment is None or moment.dim() == 1:
        return weight[:, kept]
    root = torch.linalg.cholesky(moment[kept][:, kept])
    return torch.cholesky_solve((weight @ moment[:, kept]).mT, root).mT


def _round(m: Tensor, p: Tensor, size: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Take ``count`` groups out; return them, the cost of each, and M and P of the rest.

    On the way M is m - U B' - B U' and P is p - V V', with (k, columns) factors; only the diagonal blocks of
    both are kept up to date.
    """
    k, device = len(m), m.device
    m_blocks, p_blocks = _diagonal_blocks(m, size), _diagonal_blocks(p, size)
    v, b, u = (torch.zeros(k, count * size, dtype=m.dtype, device=device) for _ in range(3))
    taken = torch.zeros(k // size, dtype=m.dtype, device=device)
    gone, spent = [], []
    for i in range(count):
        scores = _costs(m_blocks, p_blocks) + taken
        group = int(scores.argmin())
        cost, start, done = scores[group], group * size, i * size
        here, old, new = slice(start, start + size), slice(done), slice(done, done + size)
        column = p[:, here] - v[:, old] @ v[here, old].mT
        root = torch.linalg.cholesky(column[here])
        v[:, new] = torch.linalg.solve_triangular(root.mT, column, upper=True, left=False)
        b[:, new] = torch.linalg.solve_triangular(root, v[:, new], upper=False, left=False)
        column = m[:, here] - u[:, old] @ b[here, old].mT - b[:, old] @ u[here, old].mT
        u[:, new] = column - b[:, new] @ column[here] / 2
        p_blocks -= _products(v[:, new], v[:, new], size)
        change = _products(u[:, new], b[:, new], size)
        m_blocks -= change + change.mT
        taken[group] = torch.inf
        gone.append(group)
        spent.append(cost.clamp_min(0))
    stay = (taken == 0).repeat_interleave(size).nonzero()[:, 0]
    v, b, u = v[stay], b[stay], u[stay]
    change = u @ b.mT
    m = m[stay][:, stay] - change - change.mT
    return torch.tensor(gone, device=device), torch.stack(spent), m, p[stay][:, stay] - v @ v.mT


def _costs(m_blocks: Tensor, p_blocks: Tensor) -> Tensor:
    """tr(M_gg (P_gg)^-1) of each group; a group that is gone may hold anything."""
    if m_blocks.shape[-1] == 1:
        return (m_blocks / p_blocks)[:, 0, 0].nan_to_num(posinf=torch.inf, neginf=torch.inf)
    roots, failed = torch.linalg.cholesky_ex(p_blocks)
    return torch.cholesky_solve(m_blocks, roots).diagonal(dim1=-2, dim2=-1).sum(-1).where(failed == 0, torch.inf)


def _inverse(inputs: Metric, k: int) -> Tensor:
    """C^-1, (k, k)."""
    root = inputs.root
    if root is None:
        return torch.eye(k, dtype=torch.float64)
    return (1 / root.square()).diag() if root.dim() == 1 else torch.cholesky_inverse(root)


def _diagonal_blocks(x: Tensor, size: int) -> Tensor:
    """The (groups, size, size) blocks on the diagonal, copied."""
    groups = len(x) // size
    return x.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()


def _products(x: Tensor, y: Tensor, size: int) -> Tensor:
    """The (groups, size, size) diagonal blocks of x y'."""
    return x.unflatten(0, (-1, size)) @ y.unflatten(0, (-1, size)).mT
