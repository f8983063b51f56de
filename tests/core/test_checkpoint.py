"""Checkpoints are written one tensor at a time, and read back bit by bit."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rankwise.core.checkpoint import load_tree, save_tree
from rankwise.core.live import LiveBytes


def same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(value, two[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def test_all_kinds_of_tensors_come_back(tmp_path: Path):
    """Also transposed ones, parts of others, the same one twice, scalars, and empty ones."""
    whole = torch.arange(12.0).view(3, 4)
    kinds = [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool]
    tree = {
        "views": [whole, whole.mT, whole[1:, ::2], whole],
        "kinds": {str(kind): whole.to(kind) for kind in kinds},
        "few": [torch.tensor(3), torch.zeros(0, 5), torch.tensor([float("nan")]).isnan()],
        "plain": [1, 2.5, "word", None, True, {}],
        7: {"numbers": "are keys too"},
    }
    save_tree(tree, tmp_path / "file")
    assert same(tree, load_tree(tmp_path / "file"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_one_tensor_at_a_time_is_copied(tmp_path: Path):
    tensors = [torch.randn(64, 32).mT for _ in range(8)]  # in another order than in the file
    with LiveBytes(tensors) as live:
        save_tree(tensors, tmp_path / "file")
    assert 0 < live.peak <= 2 * tensors[0].nbytes
    with LiveBytes([each.mT for each in tensors]) as live:
        save_tree([each.mT for each in tensors], tmp_path / "file")
    assert live.peak == 0


def test_a_damaged_file_is_named(tmp_path: Path):
    save_tree([torch.ones(100)], tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    for cut in (0, 20, len(content) - 1):
        (tmp_path / "file").write_bytes(content[:cut])
        with pytest.raises(ValueError, match="is no checkpoint or is damaged"):
            load_tree(tmp_path / "file")


def test_infinite_settings_are_kept(tmp_path: Path):
    save_tree({"growth": math.inf}, tmp_path / "tree")
    assert load_tree(tmp_path / "tree") == {"growth": math.inf}
