"""How kinds of layers are seen as matrices."""

import abc
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..matrices import BlockAffine, KeptColumn, Several, StructuredMatrix, Sum
from .errors import CalibrationError
from .stacks import Slice, kind_of


class View(abc.ABC):
    """How a kind of layer is seen as an (m, n) matrix that maps rows of inputs to rows of outputs."""

    called: ClassVar[str]  # by users

    @classmethod
    @abc.abstractmethod
    def of(cls, layer: nn.Module) -> Self | None:
        """Return the view of a layer, or None if this view does not fit it."""

    @abc.abstractmethod
    def matrix(self, weight: Tensor) -> Tensor:
        """See the layer's weight as (m, n)."""

    @abc.abstractmethod
    def stored(self, matrix: Tensor) -> Tensor:
        """Give an (m, n) matrix the form of the layer's weight."""

    @abc.abstractmethod
    def inputs(self, x: Tensor) -> Tensor:
        """See a batch of the layer's inputs as (..., n)."""

    def means(self, x: Tensor) -> Tensor | None:
        """Return the means (b, n) of each sample's rows of ``inputs``, if they cost less than these rows."""
        return None

    @abc.abstractmethod
    def outputs(self, y: Tensor) -> Tensor:
        """See a batch of the layer's outputs, or their gradients, as (..., m)."""

    @abc.abstractmethod
    def apply(self, matrix: StructuredMatrix, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute what the layer computes, with its weight replaced by ``matrix``."""

    def told(self, m: int) -> dict[str, Any]:
        """What the layer tells of itself, beside its sizes, to modules that read it, where it has m outputs."""
        return {}

    def adapted(self, matrix: StructuredMatrix) -> StructuredMatrix:
        """Return an adapted matrix with what the layer leaves alone when it trains left alone."""
        return matrix

    @abc.abstractmethod
    def restore(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """Build the ordinary layer again from an (m, n) weight."""


@dataclasses.dataclass(frozen=True)
class LinearView(View):
    """``nn.Linear``: the weight is the matrix."""

    called = "linear layer"

    @classmethod
    def of(cls, layer: nn.Module) -> Self | None:
        """Fit ``nn.Linear``, and subclasses that hold nothing else and compute the same."""
        kind = kind_of(layer)
        return cls() if kind is nn.Linear or (_bare(layer) and computes_linear(kind)) else None

    def matrix(self, weight: Tensor) -> Tensor:
        """(m, n) as it is."""
        return weight

    def stored(self, matrix: Tensor) -> Tensor:
        """(m, n) as it is."""
        return matrix

    def inputs(self, x: Tensor) -> Tensor:
        """(..., n) as it is."""
        return x

    def outputs(self, y: Tensor) -> Tensor:
        """(..., m) as it is."""
        return y

    def apply(self, matrix: StructuredMatrix, x: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the matrix and add the bias."""
        return matrix(x) if bias is None else matrix.affine(x, bias)

    def restore(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """Build an ``nn.Linear``."""
        m, n = weight.shape
        return _filled(nn.Linear(n, m, bias=bias is not None, device="meta"), weight, bias)


@dataclasses.dataclass(frozen=True)
class TransposedView(LinearView):
    """transformers' ``Conv1D``: a linear layer that stores its weight as (n, m)."""

    called = "Conv1D of transformers"

    kind: type[nn.Module]

    @classmethod
    def of(cls, layer: nn.Module) -> Self | None:
        """Fit ``transformers.pytorch_utils.Conv1D`` without importing it."""
        kind = kind_of(layer)
        name = f"{kind.__module__}.{kind.__qualname__}"
        return cls(kind) if name == "transformers.pytorch_utils.Conv1D" else None

    def matrix(self, weight: Tensor) -> Tensor:
        """Transpose (n, m) to (m, n)."""
        return weight.mT

    def stored(self, matrix: Tensor) -> Tensor:
        """Transpose (m, n) to (n, m)."""
        return matrix.mT

    def restore(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """Build a ``Conv1D``, which always has a bias."""
        m, n = weight.shape
        with torch.device("meta"):
            layer = self.kind(m, n)
        return _filled(layer, self.stored(weight), weight.new_zeros(m) if bias is None else bias)


@dataclasses.dataclass(frozen=True)
class Conv2dView(View):
    """``nn.Conv2d`` without groups: the (m, channels * height * width) matrix applied to every patch."""

    called = "2-D convolution without groups"

    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, layer: nn.Module) -> Self | None:
        """Fit ``nn.Conv2d`` with one group and as many zeros on both sides."""
        if (
            not isinstance(layer, nn.Conv2d)
            or kind_of(layer) is not nn.Conv2d
            or layer.groups != 1
            or layer.padding_mode != "zeros"
        ):
            return None
        padding = layer.padding
        if isinstance(padding, str):
            left, right, top, bottom = layer._reversed_padding_repeated_twice
            if (left, top) != (right, bottom):
                return None
            padding = (top, left)
        pairs = (layer.kernel_size, layer.stride, padding, layer.dilation)
        kernel, stride, padding, dilation = ((int(p[0]), int(p[1])) for p in pairs)
        return cls(layer.in_channels, kernel, stride, padding, dilation)

    def matrix(self, weight: Tensor) -> Tensor:
        """Flatten (m, channels, height, width) to (m, n)."""
        return weight.flatten(1)

    def stored(self, matrix: Tensor) -> Tensor:
        """See (m, n) as (m, channels, height, width)."""
        return matrix.unflatten(1, (self.channels, *self.kernel))

    def inputs(self, x: Tensor) -> Tensor:
        """Cut (b, channels, H, W) into patches: (b, positions, n)."""
        geometry = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return functional.unfold(x, self.kernel, **geometry).mT

    def told(self, m: int) -> dict[str, Any]:
        """As ``nn.Conv2d`` tells it."""
        alike = {
            "kernel_size": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
        }
        return {**alike, "in_channels": self.channels, "out_channels": m, "groups": 1, "padding_mode": "zeros"}

    def means(self, x: Tensor) -> Tensor | None:
        """Average all patches: the pixels that come to stand at each place of one, by rows, then columns."""
        if x.dim() != 4:
            return None
        sums, positions = x, self._positions(x.shape[-2:])
        for axis in (0, 1):
            k, s, p, d = self.kernel[axis], self.stride[axis], self.padding[axis], self.dilation[axis]
            sums = _sums_of_strides(sums, [i * d - p for i in range(k)], s, positions[axis])
        return sums.flatten(1) / math.prod(positions)

    def outputs(self, y: Tensor) -> Tensor:
        """See (b, m, H, W) as (b, positions, m), or (m, H, W) as (positions, m)."""
        return y.flatten(-2).mT

    def apply(self, matrix: StructuredMatrix, x: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the matrix to every patch and fold the positions back into an image."""
        batched = x if x.dim() == 4 else x[None]
        patches = self.inputs(batched)
        if isinstance(matrix, Sum | BlockAffine | Several):
            patches = patches.contiguous()  # one copy for all terms; the product with a base is then rounded once
        y = (matrix(patches) if bias is None else matrix.affine(patches, bias)).mT
        y = y.unflatten(2, self._positions(batched.shape[-2:]))
        return y if x.dim() == 4 else y[0]

    def restore(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """Build an ``nn.Conv2d``."""
        geometry: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        layer = nn.Conv2d(
            self.channels, weight.shape[0], self.kernel, bias=bias is not None, device="meta", **geometry
        )
        return _filled(layer, self.stored(weight), bias)

    def _positions(self, image: torch.Size) -> tuple[int, int]:
        each = zip(image, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        height, width = ((i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d in each)
        return height, width


def _sums_of_strides(x: Tensor, starts: Sequence[int], stride: int, count: int) -> Tensor:
    """Sum (b, c, h, ...) over ``count`` places of its third axis from each start on; what is outside is zero.

    The sums (k) become the last axis.
    """
    found = []
    for start in starts:
        inside = start + stride * max(0, -(start // stride))  # the first place that is not before the image
        found.append(x[:, :, inside : max(0, start + stride * (count - 1) + 1) : stride].sum(2))
    return torch.stack(found, -1)


@dataclasses.dataclass(frozen=True)
class SliceView(LinearView):
    """One matrix of a 3-D parameter, such as an expert's, stored as (m, n) or (n, m)."""

    called = "3-D parameter of matrices"

    transposed: bool

    @classmethod
    def of(cls, layer: nn.Module) -> Self | None:
        """Fit a layer of a :class:`Stack` that is as it was."""
        return cls(layer.transposed) if isinstance(layer, Slice) else None

    def matrix(self, weight: Tensor) -> Tensor:
        """Transpose what is stored as (n, m)."""
        return weight.mT if self.transposed else weight

    def stored(self, matrix: Tensor) -> Tensor:
        """Transpose to (n, m) what is stored so."""
        return matrix.mT if self.transposed else matrix

    def restore(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """Build a :class:`Slice`."""
        return Slice(
            nn.Parameter(self.stored(weight)),
            self.transposed,
            None if bias is None else parameter_of(bias),
        )


@dataclasses.dataclass(frozen=True)
class EmbeddingView(View):
    """``nn.Embedding``: its table, transposed, applied to the numbers of tokens as if they were rows with a one.

    It is not among ``VIEWS``: what looks at a model's matrices passes over its tables unless they are asked for.
    """

    called = "embedding"

    padding: int | None

    @classmethod
    def of(cls, layer: nn.Module) -> Self | None:
        """Fit ``nn.Embedding`` with dense gradients that does not change its table by itself."""
        if (
            not isinstance(layer, nn.Embedding)
            or kind_of(layer) is not nn.Embedding
            or layer.max_norm is not None
            or layer.sparse
            or layer.scale_grad_by_freq
        ):
            return None
        return cls(layer.padding_idx)

    def matrix(self, weight: Tensor) -> Tensor:
        """Transpose the table (n, m) to (m, n)."""
        return weight.mT

    def stored(self, matrix: Tensor) -> Tensor:
        """Transpose (m, n) to the table (n, m)."""
        return matrix.mT

    def inputs(self, x: Tensor) -> Tensor:
        """Raise CalibrationError: rows with a one for each token are not written out."""
        raise CalibrationError(
            "an embedding's inputs are numbers of tokens, which have no statistics; use a method without data."
        )

    def outputs(self, y: Tensor) -> Tensor:
        """(..., m) as it is."""
        return y

    def apply(self, matrix: StructuredMatrix, x: Tensor, bias: Tensor | None) -> Tensor:
        """Look the columns up."""
        return matrix.lookup(x)

    def adapted(self, matrix: StructuredMatrix) -> StructuredMatrix:
        """Keep the vector of the padding token, which ``nn.Embedding`` does not train either."""
        return matrix if self.padding is None else KeptColumn(matrix, self.padding)

    def restore(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """Build an ``nn.Embedding``."""
        m, n = weight.shape
        layer = nn.Embedding(n, m, padding_idx=self.padding, device="meta")
        return _filled(layer, self.stored(weight), None)


VIEWS: tuple[type[View], ...] = (LinearView, TransposedView, Conv2dView, SliceView)


def view_of(layer: nn.Module) -> View | None:
    """Return how a layer is seen as a matrix, or None if it is not one."""
    return next((view for kind in VIEWS if (view := kind.of(layer)) is not None), None)


def _bare(layer: nn.Module) -> bool:
    """Whether a module is a linear layer with a weight and a bias alone."""
    inside = {*layer._parameters, *layer._buffers, *layer._modules}
    return isinstance(layer, nn.Linear) and inside == {"weight", "bias"} and layer.weight.dim() == 2


@functools.cache
def computes_linear(kind: type[nn.Module]) -> bool:
    """Whether a subclass of ``nn.Linear``, made anew, computes what that does, when it is called.

    That of ``nn.MultiheadAttention`` is not called: its owner reads the weight.
    """
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    if kind is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return False
    try:
        with unset_fake_temporarily(), torch.no_grad(), torch.device("cpu"):
            x = torch.linspace(-3, 4, 12).view(4, 3)
            made: list[Any] = [cast(Any, kind)(3, 2, bias=bias) for bias in (False, True)]
            return all(torch.allclose(each(x), functional.linear(x, each.weight, each.bias)) for each in made)
    except Exception:  # whatever others' classes raise
        return False


def _filled(layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        layer.bias = parameter_of(bias)
    return layer


def parameter_of(tensor: Tensor) -> nn.Parameter:
    """The parameter itself, so that sharing and flags last, or a new one."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
