"""Layers that a server fuses, such as queries, keys and values: which matrices they hold, loaded and split.

Pure functions of names, specs and tensors; they know no server.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.sharding import columns, rows, span
from ..matrices import Dense, StructuredMatrix, from_spec
from ..matrices.base import check_parts

Spec = Mapping[str, Any]


def specs_by_name(groups: Any) -> dict[str, Spec]:
    """Return the spec of each layer from what ``quantization_config`` lists under ``matrices``.

    Raises:
        ValueError: if layers share a matrix or a part of one, which the file holds under one name only, or one
            got a bias, for which servers have no place.
    """
    found = {}
    for group in groups:
        sharing = [*group["names"], *(layer for layer, _ in group.get("shared", {}).values())]
        if len(sharing) > 1:
            raise ValueError(
                f"{', '.join(sharing)} share a matrix or part of one; serve `rankwise export --to dense` instead."
            )
        if group.get("biased"):
            raise ValueError(
                f"{group['names'][0]} got a bias from compression, which would be left out in serving; compress "
                "by a method that shifts no means, such as WhitenedSvd in place of Lord."
            )
        found[group["names"][0]] = group["spec"]
    return found


def member_specs(prefix: str, fused: Mapping[str, Sequence[str]], specs: Mapping[str, Spec]) -> list[Spec | None]:
    """Return the spec of each matrix of a layer, in order, or None for those that are dense.

    Args:
        prefix: the layer's name in the server, such as ``model.layers.0.self_attn.qkv_proj``.
        fused: the last parts of names, ``{"qkv_proj": ["q_proj", "k_proj", "v_proj"]}``; others are not fused.
        specs: from :func:`specs_by_name`.
    """
    parent, dot, last = prefix.rpartition(".")
    return [specs.get(f"{parent}{dot}{member}") for member in fused.get(last, [last])]


def tensor_shapes(members: Sequence[Spec | None]) -> dict[str, dict[int, tuple[int, ...]]]:
    """Return which tensors a file holds for the matrices of a layer: name -> number of the matrix -> shape.

    Structured matrices have an empty ``weight``; that of a dense one is not listed, its shape is the server's.

    >>> tensor_shapes([{"kind": "LowRank", "shape": [4, 3], "rank": 2}, None])
    {'weight': {0: (0,)}, 'matrix.left': {0: (4, 2)}, 'matrix.right': {0: (2, 3)}}
    """
    found: dict[str, dict[int, tuple[int, ...]]] = {}
    for i, spec in enumerate(members):
        if spec is not None:
            found.setdefault("weight", {})[i] = (0,)
            for key, tensor in from_spec(spec, device="meta").state_dict().items():
                found.setdefault(f"matrix.{key}", {})[i] = tuple(tensor.shape)
    return found


def assemble(
    members: Sequence[Spec | None], tensors: Mapping[str, Mapping[int, Tensor]]
) -> list[StructuredMatrix]:
    """Return the whole matrices of a layer from the tensors of :func:`tensor_shapes`, and dense weights.

    Raises:
        ValueError: if a tensor is missing, has another shape, or holds what its matrix cannot use.
    """
    found: list[StructuredMatrix] = []
    for i, spec in enumerate(members):
        if spec is None:
            found.append(Dense(_tensor(tensors, "weight", i)))
            continue
        matrix = from_spec(spec, device="meta")
        values = {key: _tensor(tensors, f"matrix.{key}", i) for key in matrix.state_dict()}
        for key, like in matrix.state_dict().items():
            value = values[key]
            if value.shape != like.shape or value.is_floating_point() != like.is_floating_point():
                raise ValueError(
                    f"matrix.{key} of matrix {i} is {value.dtype} {tuple(value.shape)}, not {tuple(like.shape)} "
                    f"of {'numbers' if like.is_floating_point() else 'integers'}; the file is damaged."
                )
        matrix.load_state_dict(values, assign=True)
        check_parts(f"matrix {i}", matrix)
        found.append(matrix)
    return found


def split(
    matrices: Sequence[StructuredMatrix], outputs: Sequence[int], inputs: int, rank: int, world: int
) -> list[StructuredMatrix]:
    """Return the part of each matrix of a layer that one of several devices holds.

    Args:
        matrices: whole, (m, n) each.
        outputs: how many rows of each the device holds: m, or fewer in a layer whose outputs are split.
        inputs: how many columns it holds: n, or fewer in a layer whose inputs are split.
        rank: of the device.
        world: how many there are.

    Raises:
        ValueError: if the file has one matrix for what the server counts as several, or sides cannot be split so.
    """
    if len(matrices) != len(outputs):
        raise ValueError(
            f"the file holds {len(matrices)} matrix for {len(outputs)} outputs, fused as the server fuses them; "
            "serve `rankwise export --to dense` instead."
        )
    parts = []
    for matrix, count in zip(matrices, outputs, strict=True):
        (m, n), part = matrix.shape, matrix
        if count < m:
            part = rows(part, *span(m, count, rank, world))
        if inputs < n:
            part = columns(part, *span(n, inputs, rank, world))
        parts.append(part)
    return parts


def apply(parts: Sequence[StructuredMatrix], x: Tensor) -> Tensor:
    """Apply the matrices of a layer: (..., n) -> the outputs of all, one after another."""
    return torch.cat([part(x) for part in parts], dim=-1)


def _tensor(tensors: Mapping[str, Mapping[int, Tensor]], name: str, i: int) -> Tensor:
    try:
        return tensors[name][i]
    except KeyError as error:
        raise ValueError(f"{name} of matrix {i} is not in the checkpoint; it is incomplete.") from error
