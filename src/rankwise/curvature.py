"""Spectra of a network's derivatives: by its inputs (Jacobian) and by its parameters (Fisher, tangent kernel)."""

import abc
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .core.linearised import Linearised, differentiable, output_rows, run
from .core.methods import check_count
from .core.report import Report
from .core.statistics import Batch
from .linalg import lanczos, seeded


class OutputLaw(abc.ABC):
    """What outputs (t, k) are the parameters of, by the Fisher information H = L L' of a row of them."""

    @abc.abstractmethod
    def up(self, outputs: Tensor, u: Tensor) -> Tensor:
        """Return L u for each row u of (t, k)."""

    @abc.abstractmethod
    def down(self, outputs: Tensor, u: Tensor) -> Tensor:
        """Return L' u for each row u of (t, k)."""


@dataclass(frozen=True)
class Categorical(OutputLaw):
    """Outputs are logits: H = diag(p) - p p' with p their softmax, the Hessian of cross-entropy for any label."""

    def up(self, outputs: Tensor, u: Tensor) -> Tensor:
        """L = diag(sqrt p) - p sqrt(p)'."""
        p = outputs.detach().softmax(-1)
        return p.sqrt() * u - p * (p.sqrt() * u).sum(-1, keepdim=True)

    def down(self, outputs: Tensor, u: Tensor) -> Tensor:
        """L' = diag(sqrt p) - sqrt(p) p'."""
        p = outputs.detach().softmax(-1)
        return p.sqrt() * (u - (p * u).sum(-1, keepdim=True))


@dataclass(frozen=True)
class Gaussian(OutputLaw):
    """Outputs are means of unit variance: H = I, the Hessian of half the squared error."""

    def up(self, outputs: Tensor, u: Tensor) -> Tensor:
        """Nothing happens."""
        return u

    def down(self, outputs: Tensor, u: Tensor) -> Tensor:
        """Nothing happens."""
        return u


def fisher_spectrum(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    count: int | None = 1,
    law: OutputLaw = Categorical(),
    names: Sequence[str] | None = None,
    steps: int = 100,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> Report:
    """Find the largest eigenvalues of the Fisher information of a model's parameters.

    It is F = mean over output rows of J' H J, with J a row's derivative by all parameters and H that of the
    labels' law: the true Fisher information, with labels drawn from the model, which is for these laws also the
    generalised Gauss-Newton matrix of the loss. Labels of data do not come in; the second moment of gradients at
    these ("empirical Fisher") is another matrix. Gradient descent on the mean loss is stable for learning rates
    up to 2 / largest where F is near the Hessian.

    Args:
        model: any module whose operations have two derivatives; in evaluation mode meanwhile.
        batches: as the model takes them, without labels. A keyword ``attention_mask`` marks padding. More batches
            take longer, not more memory. The work is done in the model's type, float32 or wider.
        count: how many eigenvalues, by Lanczos' method, at three passes over the data a step. None finds all that
            are not zero through the Gram matrix of the t k rows of L' J, which takes t k passes and rows of all
            parameters; for small networks and few samples.
        law: what outputs mean: ``Categorical()`` or ``Gaussian()`` of :mod:`rankwise.curvature`.
        names: parameters that F is of, such as those of one layer; None means all.
        steps: of Lanczos' method at most; a vector of all parameters is kept for each.
        tolerance: of residuals, as a share of the largest eigenvalue.
        seed: of its start.

    Returns:
        a row for each eigenvalue, with its residual, which it is at most off by. Totals: ``largest``, ``params``,
        and ``outputs``, the rows t. A residual above ``tolerance`` times ``largest`` says that ``steps`` ended
        first.

    Raises:
        ValueError: if there is no batch, outputs are no rows, something is in half precision, or an argument is
            out of range.
        FloatingPointError: if something is not finite.

    References: Sokol and Park, "Information geometry of orthogonal initializations and training", 2020, arXiv
        1810.03785; Martens, "New insights and perspectives on the natural gradient method", 2020.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> from rankwise.curvature import Gaussian
    >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> [round(row["eigenvalue"], 4) for row in fisher_spectrum(net, [x], count=2, law=Gaussian()).rows]
    [4.5, 0.5]
    """
    _check(count, steps, tolerance)
    if isinstance(batches, Tensor | Mapping):
        raise ValueError("give a list of batches, such as [x], not one batch.")
    batches = list(batches)
    if not batches:
        raise ValueError("there is no batch; give at least one.")
    with differentiable(model, names) as chosen:
        parameters = list(chosen.values())
        if not parameters:
            raise ValueError("there are no parameters to differentiate by.")
        size = sum(p.numel() for p in parameters)
        if count is None:
            rows = [_rows(_derivative(model, batch, parameters), law) for batch in batches]
            total = sum(len(each) for each, _ in rows)
            outputs = sum(t for _, t in rows)
            factor = torch.cat([each for each, _ in rows])
            values = _eigenvalues(factor if total <= size else factor.mT) / outputs
            residuals = torch.zeros_like(values)
        else:
            counted: list[int] = [0]

            def apply(v: Tensor) -> Tensor:
                done, counted[0] = torch.zeros_like(v[0]), 0
                for batch in batches:
                    at = _derivative(model, batch, parameters)
                    done += at.pull(law.up(at.output, law.down(at.output, at.push(v[0]))))
                    counted[0] += len(at.output)
                return (done / counted[0])[None]

            start = torch.randn(1, size, generator=seeded(seed)).to(parameters[0])
            options = {"count": min(count, size), "steps": max(steps, count), "tolerance": tolerance}
            found, left = lanczos(apply, start, **options)
            values, residuals, outputs = found[0].clamp_min(0), left[0], counted[0]
    report = [
        {"number": i, "eigenvalue": value, "residual": residual}
        for i, (value, residual) in enumerate(zip(values.tolist(), residuals.tolist(), strict=True))
    ]
    totals = {"largest": report[0]["eigenvalue"], "params": size, "outputs": outputs}
    title = f"Fisher information of {size} parameters, mean over {outputs} outputs: {totals['largest']:.4g}"
    return Report(title, report, "eigenvalues", totals, {"Fisher": values.tolist()})


def tangent_kernel(
    model: nn.Module,
    batch: Batch,
    *,
    law: OutputLaw = Gaussian(),
    names: Sequence[str] | None = None,
) -> Tensor:
    """Return the empirical neural tangent kernel J J' of a batch, (t k, t k), or L' J J' L for another law.

    Divided by t it has the eigenvalues of the Fisher information that are not zero; see :func:`fisher_spectrum`,
    whose arguments these are. It takes t k passes, and keeps as many vectors of all parameters.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> tangent_kernel(net, torch.tensor([[3.0, 0.0], [1.0, 1.0]]))
    tensor([[9., 3.],
            [3., 2.]])
    """
    with differentiable(model, names) as chosen:
        rows, _ = _rows(_derivative(model, batch, list(chosen.values())), law)
    return rows @ rows.mT


def jacobian_spectrum(
    model: nn.Module,
    batch: Batch,
    *,
    count: int | None = None,
    after: str | None = None,
    steps: int = 100,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> Report:
    """Find the singular values of the derivative of a model's output by its input, for each sample of a batch.

    Samples must not act on each other, as they do not in evaluation mode, in which the model is meanwhile.

    Args:
        model: any module whose operations have two derivatives.
        batch: as the model takes it; samples are the first axis of inputs and outputs.
        count: how many of the largest, by Lanczos' method on J' J (powers of J itself would find eigenvalues).
            None forms J, at one pass for each number of a sample's output, and finds all.
        after: name of a module whose output takes the place of the input, such as a layer, or an embedding where
            inputs are token ids.
        steps: of Lanczos' method at most.
        tolerance: of residuals of squared singular values, as a share of the largest.
        seed: of its start.

    Returns:
        a row for each sample: ``largest``, and without ``count`` the ``median``, the ``smallest`` and ``rms``,
        the root of the mean square, which is what mean-field theory predicts where J is square; with ``count``,
        the ``residual`` of the squares. Totals have means over samples; curves all singular values found.

    Raises:
        ValueError: if the input is not floating-point, something is in half precision, or an argument is out of
            range.
        FloatingPointError: if something is not finite.

    >>> net = nn.Linear(3, 3, bias=False)
    >>> _ = nn.init.orthogonal_(net.weight, gain=2.0)
    >>> report = jacobian_spectrum(nn.Sequential(net, net), torch.ones(1, 3))
    >>> round(report.rows[0]["largest"], 4), round(report.rows[0]["smallest"], 4)
    (4.0, 4.0)
    """
    _check(count, steps, tolerance)
    with differentiable(model, ()):
        leaf, output = _from(model, batch, after)
        k, n, m = len(leaf), leaf[0].numel(), output.flatten(1).shape[1]
        at = Linearised(output, [leaf])
        if count is None:
            values = torch.linalg.svdvals(_finite(_dense(at, m, k)).double()).cpu()
            residuals = None
        else:
            start = torch.randn(k, min(m, n), generator=seeded(seed)).to(leaf)
            apply = functools.partial(_inner if n <= m else _outer, at)
            options = {"count": min(count, m, n), "steps": max(steps, count), "tolerance": tolerance}
            squares, residuals = lanczos(apply, start, **options)
            values = squares.clamp_min(0).sqrt()
    rows = [_described(i, each, residuals) for i, each in enumerate(values)]
    totals = {key: sum(row[key] for row in rows) / k for key in rows[0] if key != "sample"}
    title = f"Jacobians ({m}, {n}) of {k} samples: largest singular value {totals['largest']:.4g} on average"
    curves = {f"sample {i}": each.tolist() for i, each in enumerate(values)}
    return Report(title, rows, "samples", totals, curves)


def _described(i: int, values: Tensor, residuals: Tensor | None) -> dict[str, float]:
    row = {"sample": i, "largest": float(values[0])}
    if residuals is not None:
        return {**row, "residual": float(residuals[i].max())}
    middle, rms = values.quantile(0.5), values.square().mean().sqrt()
    return {**row, "median": float(middle), "smallest": float(values[-1]), "rms": float(rms)}


def _derivative(model: nn.Module, batch: Batch, parameters: Sequence[Tensor]) -> Linearised:
    return Linearised(output_rows(model, batch, parameters[0].device), parameters)


def _rows(at: Linearised, law: OutputLaw) -> tuple[Tensor, int]:
    """All rows of L' J, (t k, n), and t."""
    one = torch.zeros_like(at.output, memory_format=torch.contiguous_format)
    rows = []
    for i in range(one.numel()):
        one.view(-1)[i] = 1
        rows.append(at.pull(law.up(at.output, one)))
        one.view(-1)[i] = 0
    return _finite(torch.stack(rows)), len(one)


def _eigenvalues(factor: Tensor) -> Tensor:
    """Those of A A' in float64, largest first, without what is rounding of that or of A."""
    exact = factor.double()
    values = torch.linalg.eigvalsh(exact @ exact.mT).flip(-1).cpu()
    mine, own = (len(values) * torch.finfo(each.dtype).eps for each in (exact, factor))
    return values[: max(1, int((values > max(mine, own**2) * values[0]).sum()))]


def _from(model: nn.Module, batch: Batch, after: str | None) -> tuple[Tensor, Tensor]:
    """Return what derivatives are by, (k, ...), and the output (k, ...)."""
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    if after is None:
        if not isinstance(batch, Tensor) or not batch.is_floating_point():
            raise ValueError("the input must be a floating-point tensor; or name a module with after=...")
        leaf = batch.to(device).detach().clone().requires_grad_()
        output = run(model, leaf.clone(), device)  # which may be written into
    else:
        seen: list[Tensor] = []

        def cut(_: nn.Module, inputs: object, y: Tensor) -> Tensor:
            seen.append(y.detach().requires_grad_())
            return seen[-1].clone()

        with model.get_submodule(after).register_forward_hook(cut):
            output = run(model, batch, device)
        if len(seen) != 1:
            raise ValueError(f"{after} ran {len(seen)} times; name a module that runs once.")
        leaf = seen[0]
    if leaf.dim() < 2 or output.dim() < 2 or len(leaf) != len(output):
        raise ValueError(f"samples are the first axis of both, got {tuple(leaf.shape)} -> {tuple(output.shape)}.")
    return leaf, output


def _dense(at: Linearised, m: int, k: int) -> Tensor:
    """Jacobians (k, m, n) of samples that do not act on each other."""
    one = torch.zeros_like(at.output, memory_format=torch.contiguous_format)
    rows = []
    for i in range(m):
        one.view(k, m)[:, i] = 1
        rows.append(at.pull(one).view(k, -1))
        one.view(k, m)[:, i] = 0
    return torch.stack(rows, 1)


def _inner(at: Linearised, v: Tensor) -> Tensor:
    """J' J v, (k, n) -> (k, n)."""
    return at.pull(at.push(v.flatten())).view_as(v)


def _outer(at: Linearised, u: Tensor) -> Tensor:
    """J J' u, (k, m) -> (k, m)."""
    return at.push(at.pull(u.view_as(at.output))).reshape(u.shape)


def _finite(values: Tensor) -> Tensor:
    if not bool(values.isfinite().all()):
        raise FloatingPointError("a derivative is not finite; look at the weights and the data.")
    return values


def _check(count: int | None, steps: int, tolerance: float) -> None:
    if count is not None:
        check_count("count", count)
    check_count("steps", steps)
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be >= 0, got {tolerance}.")
