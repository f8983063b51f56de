"""The scripts in examples/ run, and do what they say."""

import runpy
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[1] / "examples"


def test_adapt():
    before, after = runpy.run_path(str(EXAMPLES / "adapt.py"))["main"](smoke=True, steps=12, rank=4)
    assert after < 0.95 * before


def test_pretrain(capsys: pytest.CaptureFixture[str]):
    whole, again = runpy.run_path(str(EXAMPLES / "pretrain.py"))["main"](smoke=True, steps=10, rank=4)
    assert all(torch.equal(one, two) for one, two in zip(whole.parameters(), again.parameters(), strict=True))
    printed = capsys.readouterr().out
    assert "files: ['training.safetensors']" in printed
    assert "the same bits: True" in printed


def test_adapters():
    found = runpy.run_path(str(EXAMPLES / "adapters.py"))["main"](smoke=True, steps=12)
    for text in found["none"]:
        assert found[text][text] < 0.95 * found["none"][text]
        assert found["both"][text] < found["none"][text]


def test_precondition():
    without, natural = runpy.run_path(str(EXAMPLES / "precondition.py"))["main"](
        smoke=True, steps=150, target=0.85
    )
    assert natural < 0.7 * without
    assert natural < 150
