"""Files of safetensors written in parts are those that safetensors reads."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from rankwise.core.tensor_file import KINDS, write_tensors


def test_every_type_reads_back(tmp_path: Path):
    file = tmp_path / "x.safetensors"
    bits = torch.arange(48, dtype=torch.uint8)
    values = {str(i): (bits < 20) if dtype == torch.bool else bits.view(dtype) for i, dtype in enumerate(KINDS)}
    write_tensors(file, values, lambda name: [values[name]])
    with safe_open(file, framework="pt") as opened:
        assert set(opened.keys()) == set(values)
        for name, value in values.items():
            found = opened.get_tensor(name)
            assert found.dtype == value.dtype
            assert torch.equal(found.view(torch.uint8), value.view(torch.uint8))
    assert {torch.uint16, torch.uint32, torch.uint64, torch.float8_e5m2fnuz, torch.complex64} <= set(KINDS)


def test_a_type_that_no_file_holds_is_named(tmp_path: Path):
    value = torch.zeros(2, dtype=torch.complex128)
    with pytest.raises(ValueError, match=r"phase is of torch\.complex128, which safetensors does not hold"):
        write_tensors(tmp_path / "x.safetensors", {"phase": value}, lambda name: [value])
