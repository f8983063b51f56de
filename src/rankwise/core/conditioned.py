"""A layer whose gradient is preconditioned: the matrix that its weight and bias make together."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..linalg import KhatriRao
from .surgery import Site
from .views import EmbeddingView


@dataclass(frozen=True)
class Conditioned:
    """A weight, with the bias as a last column, which every input multiplies by one.

    Args:
        site: where it stands.
        weight: it trains.
        bias: (m,), if it trains.
    """

    site: Site
    weight: nn.Parameter
    bias: nn.Parameter | None

    @classmethod
    def of(cls, site: Site) -> "Conditioned | None":
        """Return what trains of a layer, or None if its weight does not."""
        weight, bias = site.layer.get_parameter("weight"), getattr(site.layer, "bias", None)
        together = isinstance(bias, nn.Parameter) and bias.requires_grad and len(site.names) == 1
        return cls(site, weight, bias if together else None) if weight.requires_grad else None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), with the bias's column."""
        m, n = self.site.view.matrix(self.weight.detach()).shape
        return m, n + (self.bias is not None)

    @property
    def tokens(self) -> bool:
        """Whether its inputs are numbers of tokens."""
        return isinstance(self.site.view, EmbeddingView)

    def gradient(self) -> Tensor | None:
        """Return the gradient (m, n) in float32 or float64, a copy; or None if there is none."""
        if self.weight.grad is None:
            return None
        matrix = self.site.view.matrix(_whole(self.weight.grad))
        if self.bias is not None:
            column = torch.zeros_like(matrix[:, 0]) if self.bias.grad is None else _whole(self.bias.grad)
            matrix = torch.cat([matrix, column[:, None]], 1)
        return matrix.to(torch.promote_types(matrix.dtype, torch.float32), copy=True)

    def put(self, gradient: Tensor) -> None:
        """Let another (m, n) matrix be the gradient."""
        if self.bias is not None:
            gradient, column = gradient[:, :-1], gradient[:, -1]
            if self.bias.grad is not None:
                _write(self.bias.grad, column)
        assert self.weight.grad is not None
        _write(self.weight.grad, self.site.view.stored(gradient))

    def with_bias(self, samples: KhatriRao) -> KhatriRao:
        """Let inputs end with the one that the bias is multiplied by."""
        if self.bias is None:
            return samples
        inputs = torch.cat([samples.inputs, torch.ones_like(samples.inputs[..., :1])], -1)
        return KhatriRao(inputs, samples.gradients, samples.width + 1)


def held(tensor: Tensor) -> Tensor:
    """Return the numbers that this process holds of a tensor."""
    if tensor.is_sparse:
        return tensor.coalesce().values()
    if type(tensor) is Tensor:
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    """Gather what is sharded."""
    if type(tensor) is Tensor:
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _write(place: Tensor, values: Tensor) -> None:
    """Write into a tensor, or each process into its shard of one."""
    if type(place) is not Tensor:
        from torch.distributed.tensor import DTensor, Replicate

        if isinstance(place, DTensor):  # all processes have the same values: each cuts its own part out
            mesh, values = place.device_mesh, values.to(place.dtype).contiguous()
            values = DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)
            values = values.redistribute(placements=place.placements)
    place.copy_(values)
