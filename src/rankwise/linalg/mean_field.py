"""Wide random networks x -> f(W x + b): what the variances of activations and of gradients become with depth.

W (N, n) has independent entries of variance s_w^2 / n, or is s_w times an orthogonal matrix; entries of b have
variance s_b^2. All is for N -> infinity and a depth far below N: fluctuations are of the order of depth / N.
"""

import copy
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Function = Callable[[Tensor], Tensor]
NODES = (2**10, 2**14, 2**18)  # of each sign; the first will do where f is smooth


def preactivation_variance(
    function: Function, weight: float, bias: float, *, start: float = 1.0, steps: int = 100_000
) -> float:
    """Return the variance q = s_w^2 E[f(sqrt(q) z)^2] + s_b^2 to which W x + b settles in deep layers.

    Args:
        function: f, of each entry alone.
        weight: s_w^2.
        bias: s_b^2.
        start: the variance of the first layer, from which steps of the map begin.
        steps: how many at most; near criticality they are slow, as q changes by a small part of q^2.

    Raises:
        ValueError: if a variance is negative, or nothing finite is reached.

    >>> round(preactivation_variance(torch.relu, 1.0, 0.5), 6)
    1.0
    """
    _check(weight, bias)
    q = start
    for _ in range(steps):
        new = weight * _mean(function, q) + bias
        if not new < 1e30:
            break
        if abs(new - q) <= 1e-14 * new:
            return new
        q = new
    raise ValueError(
        f"the variance does not settle in {steps} steps for s_w^2 = {weight}, s_b^2 = {bias}, but is at {q:.3g}."
    )


def gradient_gain(function: Function, weight: float, variance: float) -> float:
    """Return chi = s_w^2 E[f'(sqrt(q) z)^2]: the mean square of singular values of a layer's Jacobian D W.

    Below one gradients vanish with depth, above one they explode.

    Args:
        function: f, of each entry alone, which autograd can differentiate.
        weight: s_w^2.
        variance: q, of W x + b.

    >>> round(gradient_gain(torch.relu, 2.0, 0.3), 6)
    1.0
    """
    _check(weight, variance)
    return weight * _mean(slope(function), variance)


def critical_variances(function: Function, variance: float) -> tuple[float, float]:
    """Return (s_w^2, s_b^2) for which W x + b keeps a variance q and gradients keep theirs (chi = 1).

    A small q keeps f nearly linear, so that with orthogonal W all singular values of the Jacobian stay near one,
    where f has a slope at zero; for ReLU they never do.

    Args:
        function: f, of each entry alone, which autograd can differentiate.
        variance: q > 0.

    Raises:
        ValueError: if there are none.

    References: Schoenholz et al., "Deep information propagation", 2017; Pennington et al., "Resurrecting the
        sigmoid in deep learning through dynamical isometry", 2017.

    >>> [round(value, 6) for value in critical_variances(torch.relu, 0.5)]
    [2.0, 0.0]
    """
    if not 0 < variance < float("inf"):
        raise ValueError(f"variance must be a finite number > 0, got {variance}.")
    steep = _mean(slope(function), variance)
    if not steep > 0:
        raise ValueError("the function is constant where it is looked at; no weights keep gradients.")
    weight = 1 / steep
    bias = variance - weight * _mean(function, variance)
    if bias < -1e-9 * variance:
        raise ValueError(f"there is no critical point of variance {variance}: biases would have {bias:.3g}.")
    return weight, max(bias, 0.0)


def slope(function: Function) -> Function:
    """Return the derivative of a function of each entry alone."""
    function = _wide(function)

    def derivative(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(function(x).sum(), x)[0]

    return derivative


def _wide(function: Function) -> Function:
    """A module, such as ``nn.PReLU()``, may have parameters of another type."""
    return copy.deepcopy(function).to("cpu", torch.float64) if isinstance(function, nn.Module) else function


def _mean(function: Function, variance: float) -> float:
    """E[f(sqrt(q) z)^2], by more and more nodes until the mean stays; jumps of f leave 1e-4 of it at most."""
    function, found = _wide(function), math.nan
    for count in NODES:
        nodes, weights = _normal(count)
        before, found = found, float(weights @ function(variance**0.5 * nodes).detach().square())
        if abs(found - before) <= 1e-12 * found:
            break
    return found


@functools.cache
def _normal(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights (2 count,) of a standard normal mean.

    It is the rule of equal steps of t, with z = +-exp(t): any scale is resolved alike, however large q is, and no
    node is at zero, where ReLU bends. Errors fall exponentially where f is smooth off zero.
    """
    positive = torch.linspace(-40, 2.6, count, dtype=torch.float64).exp()  # from 4e-18 to 13.5
    weights = positive * (-positive.square() / 2).exp()
    weights = weights / (2 * weights.sum())
    return torch.cat([-positive, positive]), torch.cat([weights, weights])


def _check(*variances: float) -> None:
    for value in variances:
        if not 0 <= value < float("inf"):
            raise ValueError(f"variances must be finite numbers >= 0, got {value}.")
