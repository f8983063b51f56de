"""The scripts in examples/ run, and do what they say."""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_adapt():
    before, after = runpy.run_path(str(EXAMPLES / "adapt.py"))["main"](smoke=True, steps=12, rank=4)
    assert after < 0.95 * before


def test_adapters():
    found = runpy.run_path(str(EXAMPLES / "adapters.py"))["main"](smoke=True, steps=12)
    for text in found["none"]:
        assert found[text][text] < 0.95 * found["none"][text]
        assert found["both"][text] < found["none"][text]
