"""Files of safetensors written in parts are those that safetensors reads."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from rankwise.core import tensor_file
from rankwise.core.tensor_file import KINDS, read_tensor, write_tensors


def test_every_type_reads_back(tmp_path: Path):
    file = tmp_path / "x.safetensors"
    bits = torch.arange(48, dtype=torch.uint8)
    values = {str(i): (bits < 20) if dtype == torch.bool else bits.view(dtype) for i, dtype in enumerate(KINDS)}
    write_tensors(file, values)
    with safe_open(file, framework="pt") as opened:
        assert set(opened.keys()) == set(values)
        for name, value in values.items():
            found = opened.get_tensor(name)
            assert found.dtype == value.dtype
            assert torch.equal(found.view(torch.uint8), value.view(torch.uint8))
    assert {torch.uint16, torch.uint32, torch.uint64, torch.float8_e5m2fnuz, torch.complex64} <= set(KINDS)


def test_tensors_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tensor_file, "PART", 10)
    values = {
        "a": torch.randn(7, 4),
        "b": torch.randn(3),
        "c": torch.tensor(2),
        "d": torch.ones(5, 20).bfloat16(),
    }
    values |= {"none": torch.empty(0), "turned": torch.randn(1, 9).mT[:1]}
    write_tensors(tmp_path / "x.safetensors", values)
    for name, value in values.items():
        found = read_tensor(tmp_path / "x.safetensors", name)
        assert found.dtype == value.dtype
        assert torch.equal(found, value)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peaks of memory are read from /proc")
def test_writing_and_reading_take_no_second_copy(tmp_path: Path):
    code = f"""
import sys, torch
from pathlib import Path
from rankwise.core.memory import peak_memory_bytes, reset_peak_memory
from rankwise.core.tensor_file import read_tensor, write_tensors
file, value = Path({str(tmp_path / "x.safetensors")!r}), torch.ones(2**16, 2**10)
write_tensors(file, {{"a": value[:8]}})
read_tensor(file, "a")
reset_peak_memory()
before = peak_memory_bytes()
write_tensors(file, {{"a": value}})
written = peak_memory_bytes() - before
del value
reset_peak_memory()
before = peak_memory_bytes()
read_tensor(file, "a")
print(written, peak_memory_bytes() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    written, read = map(int, done.stdout.split())
    assert written < 2**25
    assert read < 2**28 + 2**27


def test_a_type_that_no_file_holds_is_named(tmp_path: Path):
    value = torch.zeros(2, dtype=torch.complex128)
    with pytest.raises(ValueError, match=r"phase is of torch\.complex128, which safetensors does not hold"):
        write_tensors(tmp_path / "x.safetensors", {"phase": value})
