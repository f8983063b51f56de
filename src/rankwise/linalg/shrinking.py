"""Functions that leave the large entries of a matrix and set the others to zero.

Each takes a matrix and a threshold, which is a constant to the gradient. Entries as large as the threshold stay.
"""

from torch import Tensor


def hard(matrix: Tensor, threshold: Tensor) -> Tensor:
    """Leave large entries as they are.

    >>> import torch
    >>> hard(torch.tensor([1.0, -3.0]), torch.tensor(2.0)).tolist()
    [0.0, -3.0]
    """
    return matrix.where(matrix.detach().abs() >= threshold, 0)


def soft(matrix: Tensor, threshold: Tensor) -> Tensor:
    """Leave large entries, less the threshold: no jump where an entry comes or goes.

    >>> import torch
    >>> soft(torch.tensor([1.0, -3.0]), torch.tensor(2.0)).tolist()
    [0.0, -1.0]
    """
    values = matrix.detach()
    return (matrix - values.sign() * threshold).where(values.abs() >= threshold, 0)


def magnitude(matrix: Tensor, threshold: Tensor) -> Tensor:
    """Leave large entries times their absolute values, which are constants to the gradient.

    >>> import torch
    >>> magnitude(torch.tensor([1.0, -3.0]), torch.tensor(2.0)).tolist()
    [0.0, -9.0]
    """
    values = matrix.detach().abs()
    return (matrix * values).where(values >= threshold, 0)


def smallest_kept(matrix: Tensor, kept: int) -> Tensor:
    """Return the absolute value of the ``kept``-th largest entry, and zero if that is the smallest of all.

    A selection, without the limit on sizes of ``torch.quantile``.

    >>> import torch
    >>> float(smallest_kept(torch.tensor([[3.0, -1.0], [2.0, 4.0]]), 2))
    3.0
    """
    values = matrix.detach().abs().flatten()
    if kept >= len(values):
        return values.new_zeros(())
    return values.kthvalue(len(values) - kept + 1).values
