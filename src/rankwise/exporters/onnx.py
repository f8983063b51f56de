"""ONNX, for onnxruntime and what else reads it."""

import contextlib
import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..core.finite import is_finite
from ..core.surgery import fold, structured
from ..matrices import (
    Dense,
    Diagonal,
    LowRank,
    Permutation,
    PivotedLowRank,
    Product,
    Scaled,
    StructuredMatrix,
    Sum,
)
from ..models.causal import evaluating
from .base import Exporter, Source

LARGEST = 10**9  # bytes of weights in one file with the graph; more stand in a file beside it
TOLERANCE = 1e-4  # of the largest output
ROUNDING = 8 * torch.finfo(torch.float32).eps  # of the largest number on the way; sums in another order need 3
APPLICABLE = (Dense, Diagonal, LowRank, Permutation, PivotedLowRank, Product, Scaled, Sum)


@dataclass(frozen=True, kw_only=True)
class Onnx(Exporter):
    """A file ``model.onnx`` in float32 whose low-rank layers keep their factors; other kinds are written out.

    A causal language model of transformers maps ``input_ids`` (b, t) to logits, another model of tokens maps
    ``input_ids`` and ``attention_mask`` to its first output, the last hidden state; b and t may vary. Any other
    module needs an example. onnxruntime must compute what the module computes before the file counts as written.

    Args:
        fold: whether structured layers are written out as ordinary ones.
        example: the inputs of a module that is no model of tokens; their first sizes may vary.
    """

    fold: bool = False
    example: tuple[Tensor, ...] = ()

    def write(self, source: Source, out: Path) -> None:
        """Trace the model, write it and run it.

        Raises:
            ValueError: if it is not in float32, has nothing to fold or unknown inputs, cannot be traced, or
                computes something else in onnxruntime; or if a package is missing.
        """
        model = source.model(torch.float32)
        wrong = {t.dtype for t in model.state_dict().values() if t.is_floating_point()} - {torch.float32}
        if wrong:
            raise ValueError(f"the model is in {wrong.pop()}, but is exported in float32; give model.float().")
        if model is source.given and any(isinstance(part, StructuredMatrix) for part in model.modules()):
            model = copy.deepcopy(model)
        if self.fold and not structured(model):
            raise ValueError("the model has no structured layer to fold; export it without fold.")
        model = fold(model) if self.fold else _written_out(model)
        module, inputs, free = _traced(model, self.example)
        with evaluating(module):
            _save(module, inputs, free, out / "model.onnx")
            longer = {name: torch.cat([x] * 2, dim=free - 1) for name, x in inputs.items()}
            for each in (inputs, longer):
                _compare(module, each, out / "model.onnx")


def _written_out(module: nn.Module) -> nn.Module:
    """Replace the matrices inside a module that ONNX cannot apply as they are: it has no bits to unpack."""
    for name, child in module.named_children():
        if isinstance(child, StructuredMatrix) and not isinstance(child, APPLICABLE):
            setattr(module, name, Dense(child.dense().detach()))
        else:
            _written_out(child)
    return module


class _First(nn.Module):
    """The first output of a model of transformers, as a function of tensors alone."""

    def __init__(self, model: nn.Module, cached: bool) -> None:
        super().__init__()
        self.model, self.options = model, {"use_cache": False} if cached else {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **self.options, return_dict=True)[0]


def _traced(model: nn.Module, example: Sequence[Tensor]) -> tuple[nn.Module, dict[str, Tensor], int]:
    """Return what is exported, inputs by name, and how many of their first sizes may vary."""
    from transformers import PreTrainedModel

    if example:
        return model, {f"input_{i}": tensor for i, tensor in enumerate(example)}, 1
    known: Any = model if isinstance(model, PreTrainedModel) and model.main_input_name == "input_ids" else None
    if known is None or known.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is no model of tokens; give Onnx(example=...) in Python.")
    ids = torch.arange(2 * 7).view(2, 7) % known.config.get_text_config().vocab_size
    inputs = {"input_ids": ids}
    if not known.can_generate():
        inputs["attention_mask"] = torch.ones_like(ids)
    return _First(known, known.can_generate()), inputs, 2


def _save(module: nn.Module, inputs: Mapping[str, Tensor], free: int, path: Path) -> None:
    try:
        import onnxruntime  # noqa: F401 (missed before the long work)
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed; pip install 'rankwise[onnx]'.") from error
    shapes = tuple(dict.fromkeys(range(free), torch.export.Dim.DYNAMIC) for _ in inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own code
        try:
            program = torch.onnx.export(
                module,
                tuple(inputs.values()),
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=list(inputs),
                verbose=False,
            )
        except Exception as error:  # what torch raises is of any kind and many lines
            reason = " ".join(str(error.__cause__ or error).split())
            raise ValueError(f"the model cannot be traced: {reason[:300]}") from error
        assert program is not None
        size = sum(t.numel() * t.element_size() for t in module.state_dict().values())
        program.save(path, external_data=size > LARGEST)


def _compare(module: nn.Module, inputs: Mapping[str, Tensor], path: Path) -> None:
    """Raise unless onnxruntime computes from a file what a module computes.

    Outputs may differ by a share of the largest, and by the rounding of the largest number that a layer gives, as
    it is left where large numbers cancel.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    outputs, largest = _with_largest(module, inputs)
    for ours, theirs in zip(outputs, found, strict=True):
        error, size = float((ours - torch.from_numpy(theirs)).abs().max()), float(ours.abs().max())
        if not error <= TOLERANCE * size + ROUNDING * largest:
            raise ValueError(f"onnxruntime does not compute the same: off by {error:.3g} of {size:.3g}.")


def _with_largest(module: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[list[Tensor], float]:
    """Return the outputs of a module, and the size of the largest number that a layer with parameters gives."""
    sizes = [0.0]

    def note(layer: nn.Module, _: Any, output: Any) -> None:
        own = next(layer.parameters(recurse=False), None) is not None
        if own and isinstance(output, Tensor) and output.numel() and is_finite(output):
            sizes.append(float(output.abs().max()))

    with contextlib.ExitStack() as hooks:
        for layer in module.modules():
            hooks.enter_context(layer.register_forward_hook(note))
        return _pytree.tree_leaves(module(*inputs.values())), max(sizes)
