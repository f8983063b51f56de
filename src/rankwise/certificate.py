"""How far the outputs of a network can move, at most, when its inputs move.

The norm of a batch of rows (..., n) is the largest root mean square of a row. In this norm

- a linear layer (m, n) stretches by its largest singular value times sqrt(n / m);
- an elementwise function stretches by its largest slope;
- keep x + share f(x) stretches by |keep| + |share| (that of f);
- attention, for inputs of bounded norm: let q, k and v be how much a head's layers stretch, and Q, K and V
  bounds of what they give. An output is sum_j p_j v_j. Moving v_j moves it by at most v |dx|. Logits are means
  of products times scale, so ds_j is at most D = scale (q K + Q k) |dx|, and moves the output by sum_j p_j
  (ds_j - sum p ds) v_j. Its norm is at most V times the mean distance of ds from its mean, which is not above
  D. Together: v + scale (q K + Q k) V. Inputs of bounded norm are a convex set, so the bound of the derivative
  is a Lipschitz constant. The heads' outputs stand side by side, so the root mean square of their bounds
  counts; then comes the output layer, over three.

All bounds are computed in float64. What a network computes in a shorter type is off by rounding, which they
leave out.
"""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .core.finite import is_finite
from .core.report import Report
from .core.surgery import StructuredLinear
from .core.views import LinearView
from .layers import Blend, BoundedAttention, UnitGelu
from .layers.unit_gelu import GELU_SLOPE

SLACK = 1 + 1e-9  # for the rounding of what is computed here
Reach = tuple[float, float]  # the Lipschitz constant, and the norm of outputs
Walk = Callable[[nn.Module, str, float], Reach]


def lipschitz_bound(model: nn.Module, *, radius: float = math.inf) -> Report:
    """Bound the Lipschitz constant of a network in the norm of the largest root mean square of a row.

    For all inputs x and y (..., n) of norms up to ``radius``, |f(x) - f(y)| <= bound |x - y|. If rows are
    treated alone, lengths of rows m and n grow by at most bound sqrt(m / n). Rounding of the network itself is
    left out.

    It understands compositions of ``nn.Sequential``, linear layers, structured ones too, activations, dropout,
    and the layers of :mod:`rankwise.layers`, and refuses all else.

    Args:
        model: in evaluation mode.
        radius: of inputs; attention has no bound without one.

    Returns:
        a row for each module, with its bound and that of its outputs' norm (None if there is none); the totals
        have ``bound``, its decimal logarithm ``log10``, and ``size``, the norm of outputs.

    Raises:
        ValueError: if something is not understood, trains, is not finite, needs a radius, or has a bound that
            is no finite number.

    References: Newhouse et al., "Training transformers with enforced Lipschitz constants", 2025, arXiv
        2507.13338. Their certificate takes norms of whole matrices for heads, which is not enough.

    >>> net = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 4)).eval()
    >>> _ = [nn.init.eye_(net[i].weight) for i in (0, 2)]
    >>> round(lipschitz_bound(net).totals["bound"], 6)
    1.0
    """
    if not radius > 0:
        raise ValueError(f"radius must be > 0, got {radius}.")
    if any(module.training for module in model.modules()):
        raise ValueError(
            "the model, or a part of it, is in training mode, in which dropout differs; call model.eval()."
        )
    rows: list[dict[str, Any]] = []

    def walk(module: nn.Module, name: str, size: float) -> Reach:
        rule = RULES.get(type(module))
        if rule is None:
            raise ValueError(f"{name or 'the model'} is {_refusal(module)}")
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise ValueError(f"{name or 'the model'} has hooks, which may change what it computes; remove them.")
        row: dict[str, Any] = {"name": name or ".", "kind": type(module).__name__}
        rows.append(row)
        slope, size = rule(module, name, size, walk)
        row.update(bound=slope, size=_number(size))
        return slope, size

    slope, size = walk(model, "", radius)
    if not math.isfinite(slope):
        raise ValueError(f"the bound is {slope}, beyond all finite numbers; constrain weights while training.")
    logarithm = math.log10(slope) if slope > 0 else None
    totals = {"bound": slope, "log10": logarithm, "size": _number(size), "radius": _number(radius)}
    return Report(f"outputs move at most {slope:.4g} times as far as inputs", rows, "modules", totals)


def _sequential(module: Any, name: str, size: float, walk: Walk) -> Reach:
    slope = 1.0
    for key, part in module._modules.items():  # named_children leaves out what stands there twice
        each, size = walk(part, f"{name}.{key}".lstrip("."), size)
        slope *= each
    return slope, size


def _linear(module: Any, name: str, size: float, walk: Walk) -> Reach:
    norm = _norm(module.weight, name)
    return norm, _times(norm, size) + _shift(module.bias)


def _structured(module: Any, name: str, size: float, walk: Walk) -> Reach:
    if type(module.view) is not LinearView:
        raise ValueError(f"{name} is not seen as a linear layer of rows ({type(module.view).__name__}).")
    norm = _norm(copy.deepcopy(module.matrix).double().dense(), name)
    return norm, _times(norm, size) + _shift(module.bias)


def _blend(module: Any, name: str, size: float, walk: Walk) -> Reach:
    slope, after = walk(module.block, f"{name}.block".lstrip("."), size)
    keep, share = abs(module.keep), abs(module.share)
    return keep + share * slope, _times(keep, size) + _times(share, after)


def _attention(module: Any, name: str, size: float, walk: Walk) -> Reach:
    if not math.isfinite(size):
        raise ValueError(f"{name or 'the model'} is attention, whose bound needs bounded inputs; give radius.")
    slopes, sizes = [], []
    for i, heads in enumerate(zip(module.query, module.key, module.value, strict=True)):
        names = (f"{name}.{part}.{i}".lstrip(".") for part in ("query", "key", "value"))
        (q, queries), (k, keys), (v, values) = (walk(*pair, size) for pair in zip(heads, names, strict=True))
        slopes.append(v + abs(module.scale) * (q * keys + queries * k) * values)
        sizes.append(values)
    last, after = walk(module.output, f"{name}.output".lstrip("."), _mean(sizes))
    return _mean(slopes) * last / 3, after / 3


def _elementwise(slope: float, at_zero: float = 0.0, most: float = math.inf) -> Callable[..., Reach]:
    """The rule of a function with f(0) and values up to ``most``."""
    return lambda module, name, size, walk: (slope, min(_times(slope, size) + at_zero, most))


def _leaky(field: str) -> Callable[..., Reach]:
    """The rule of a function of slope one above zero, and at most that of a field below."""
    return lambda module, name, size, walk: _elementwise(max(1.0, abs(getattr(module, field))))(
        module, name, size, walk
    )


def _gelu(module: Any, name: str, size: float, walk: Walk) -> Reach:
    if module.approximate != "none":
        raise ValueError(f"{name} is an approximation of GELU, whose slope is not known exactly; take nn.GELU().")
    return GELU_SLOPE, _times(GELU_SLOPE, size)


def _silu_slope() -> float:
    """The largest slope of x sigmoid(x), where x tanh(x / 2) = 2."""
    x = 2.0
    for _ in range(60):
        x = 2 / math.tanh(x / 2)
    gate = 1 / (1 + math.exp(-x))
    return (gate + x * gate * (1 - gate)) * SLACK


SILU_SLOPE = _silu_slope()
RULES: dict[type[nn.Module], Callable[[Any, str, float, Walk], Reach]] = {
    Blend: _blend,
    BoundedAttention: _attention,
    StructuredLinear: _structured,
    UnitGelu: _elementwise(1.0),
    nn.Dropout: _elementwise(1.0),  # in evaluation mode
    nn.ELU: _leaky("alpha"),
    nn.GELU: _gelu,
    nn.Hardtanh: lambda module, name, size, walk: (1.0, _largest(size, module.min_val, module.max_val)),
    nn.Identity: _elementwise(1.0),
    nn.LeakyReLU: _leaky("negative_slope"),
    nn.Linear: _linear,
    nn.ReLU: _elementwise(1.0),
    nn.Sequential: _sequential,
    nn.SiLU: _elementwise(SILU_SLOPE),
    nn.Sigmoid: _elementwise(0.25, 0.5, 1.0),
    nn.Tanh: _elementwise(1.0, 0.0, 1.0),
}
REASONS: dict[type[nn.Module], str] = {
    nn.LayerNorm: "near constant rows only its eps bounds the slope; blend residuals instead of normalising",
    nn.RMSNorm: "near zero only its eps bounds the slope; blend residuals instead of normalising",
    nn.MultiheadAttention: "it has no Lipschitz constant; take rankwise.layers.BoundedAttention",
}


def _refusal(module: nn.Module) -> str:
    known = ", ".join(sorted(kind.__name__ for kind in RULES))
    reason = REASONS.get(type(module), "what it computes is not known")
    return f"{type(module).__name__}: {reason}. Understood, and none of their subclasses: {known}."


def _norm(weight: Tensor, name: str) -> float:
    """From root mean square to root mean square."""
    m, n = weight.shape
    values = weight.detach().double().cpu()
    if values.is_meta or not is_finite(values):
        raise ValueError(f"the weight of {name or 'the model'} has no finite values.")
    return float(torch.linalg.matrix_norm(values, 2)) * math.sqrt(n / m) * SLACK if m * n else 0.0


def _shift(bias: Tensor | None) -> float:
    """The norm of a bias."""
    return 0.0 if bias is None else float(bias.detach().double().square().mean().sqrt()) * SLACK


def _times(slope: float, size: float) -> float:
    """The product, where nothing times an unbounded norm is nothing."""
    return slope * size if slope else 0.0


def _mean(values: Iterable[float]) -> float:
    """The root mean square."""
    squares = [value * value for value in values]
    return math.sqrt(sum(squares) / len(squares))


def _largest(size: float, low: float, high: float) -> float:
    """The norm of clamped values: the nearest to zero of the interval, and at most its ends."""
    at_zero = abs(min(max(0.0, low), high))
    return min(size + at_zero, max(abs(low), abs(high)))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
