"""vLLM's side of :mod:`rankwise.serving.fused`. Not run: vLLM needs a GPU that this was not developed on.

It was written to the interface of vLLM's quantisation methods and tested against a stand-in for it. vLLM finds
:func:`register` by the entry point ``vllm.general_plugins``. Matrices are applied one after another by PyTorch.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..models.quantizer import FORMAT, METHOD
from . import fused

POSITIONS: dict[Any, Any] = {None: 0, "q": 0, "k": 1, "v": 2}  # what vLLM calls them -> number; 0, 1 stay


def register() -> None:
    """Teach vLLM the quantisation method ``rankwise``; a second call does nothing."""
    from vllm.model_executor.layers import quantization  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.layers.linear import (  # pyright: ignore[reportMissingImports]
        LinearBase,
        LinearMethodBase,
        UnquantizedLinearMethod,
    )

    if METHOD in quantization.QUANTIZATION_METHODS:
        return

    class Method(LinearMethodBase):
        def __init__(self, members: list[fused.Spec | None]) -> None:
            self.members = members

        def create_weights(
            self,
            layer: Any,
            input_size_per_partition: int,
            output_partition_sizes: list[int],
            *args: Any,
            **kw: Any,
        ) -> None:
            layer.rankwise_sizes = output_partition_sizes, input_size_per_partition
            layer.rankwise_tensors = {}
            for name in fused.tensor_shapes(self.members):
                _place(layer, name, _collecting(layer.rankwise_tensors.setdefault(name, {})))

        def process_weights_after_loading(self, layer: Any) -> None:
            device, dtype = layer.weight.device, layer.params_dtype
            whole = fused.assemble(self.members, layer.rankwise_tensors)
            outputs, inputs = layer.rankwise_sizes
            parts = fused.split(whole, outputs, inputs, layer.tp_rank, layer.tp_size)
            layer.rankwise_parts = nn.ModuleList(parts).to(device, dtype).requires_grad_(False)
            del layer.weight, layer.matrix, layer.rankwise_tensors

        def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
            y = fused.apply(list(layer.rankwise_parts), x)
            return y if bias is None else y + bias

    class Config(quantization.QuantizationConfig):
        def __init__(self, specs: dict[str, fused.Spec]) -> None:
            super().__init__()
            self.specs = specs

        def get_name(self) -> str:
            return METHOD

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return [torch.float32, torch.float16, torch.bfloat16]

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> "Config":
            if config.get("version") != FORMAT:
                raise ValueError(f"the model has version {config.get('version')!r} of the format, not {FORMAT}.")
            return cls(fused.specs_by_name(config["matrices"]))

        def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
            if not isinstance(layer, LinearBase):
                if any(name.startswith(f"{prefix}.") for name in self.specs):
                    raise ValueError(
                        f"{prefix} holds compressed experts, which vLLM cannot run; export to dense."
                    )
                return None
            members = fused.member_specs(prefix, self.packed_modules_mapping, self.specs)
            return Method(members) if any(members) else UnquantizedLinearMethod()

    quantization.register_quantization_config(METHOD)(Config)


def _collecting(tensors: dict[int, Tensor]) -> nn.Parameter:
    """Return an empty parameter whose loader keeps what the file holds, by the number of the matrix."""
    parameter: Any = nn.Parameter(torch.empty(0), requires_grad=False)

    def load(own: nn.Parameter, loaded: Tensor, shard: Any = None) -> None:
        tensors[POSITIONS.get(shard, shard)] = loaded

    parameter.weight_loader = load
    return parameter


def _place(layer: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Register a parameter under a dotted name, with modules in between."""
    *path, last = name.split(".")
    for part in path:
        if part not in dict(layer.named_children()):
            layer.add_module(part, nn.Module())
        layer = layer.get_submodule(part)
    layer.register_parameter(last, parameter)
