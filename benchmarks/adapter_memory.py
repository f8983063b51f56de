"""How many bytes adapters keep for the backward pass, and how much DoRA needs for a moment, against peft.

Usage: python benchmarks/adapter_memory.py
Writes results/adapter_memory.json. The model is four linear layers 256 -> 256, adapted at rank 8, with 512
tokens, in float32 under autocast to bfloat16. Saved bytes count every storage once and leave parameters out. The
temporary memory of one DoRA layer is the most that its forward and backward pass allocate at once, over what they
leave, for widths at equal tokens: O(m n) grows by 4 where the width doubles, O(m r) by 2.
"""

import gc
import json
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from common import RESULTS, command, environment, saved_bytes
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import rankwise
from rankwise.adapters import Lora

RANK, TOKENS, WIDTH, LAYERS = 8, 512, 256, 4


def plain(width: int, layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])


def ours(dora: bool, width: int = WIDTH, layers: int = LAYERS) -> nn.Module:
    model = plain(width, layers)
    rankwise.adapt(model, Lora(rank=RANK, alpha=float(RANK), magnitudes=dora))
    return model


def theirs(dora: bool, width: int = WIDTH, layers: int = LAYERS) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    names = [str(i) for i in range(layers)]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, use_dora=dora)
    return get_peft_model(plain(width, layers), config)


def step_bytes(model: nn.Module) -> int:
    """What one forward pass keeps for the backward pass, which is run, too."""
    x = torch.randn(TOKENS, WIDTH)

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    total, y = saved_bytes(model, forward)
    y.float().sum().backward()
    return total


class Peak(TorchDispatchMode):
    """Counts the bytes that operations allocate and that are still alive."""

    def __init__(self, leave_out: set[int]) -> None:
        super().__init__()
        self.leave_out = leave_out
        self.alive: dict[int, tuple[Any, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata in self.leave_out:
                    continue  # views of parameters
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        """Bytes still alive."""
        self.alive = {key: pair for key, pair in self.alive.items() if not pair[0].expired()}
        return sum(size for _, size in self.alive.values())


def temporary(model: nn.Module, width: int, tokens: int = 16) -> int:
    """The most that is alive at once in a forward and backward pass of one layer; parameters are not counted."""
    x = torch.randn(tokens, width, requires_grad=True)
    gc.collect()
    mode = Peak({t.untyped_storage()._cdata for t in (x, *model.parameters(), *model.buffers())})
    with mode:
        model(x).square().sum().backward()
    return mode.peak


def main() -> None:
    rows = []
    for name, dora in (("LoRA", False), ("DoRA", True)):
        row: dict[str, Any] = {"method": name}
        makers: dict[str, Callable[..., nn.Module]] = {"rankwise": ours, "peft": theirs}
        for maker, make in makers.items():
            row[f"saved_{maker}"] = step_bytes(make(dora))
            for width in (512, 1024):
                row[f"temporary_{maker}_{width}"] = temporary(make(dora, width, 1), width)
        rows.append(row)
        print(row)
    about = {"command": command(), "environment": {**environment(), "peft": version("peft")}}
    text = json.dumps({**about, "rows": rows}, indent=1)
    (RESULTS / "adapter_memory.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
