"""Methods that store integers of few bits."""

import pytest
import torch
from contracts.examples import draw
from contracts.problems import correlated, fill

from rankwise.compressors import Gptq, KroneckerFactoredRounding
from rankwise.compressors.low_bit import LowBit


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Gptq, KroneckerFactoredRounding])
def test_errors_of_large_weights_are_near_the_measured_ones_also_on_a_grid(kind: type[LowBit]):
    """A weight that was rounded to 4 bits loses nothing at 4, and something again at 5."""
    plain, method = draw(256, 256, dtype=torch.float32), kind(group=32)
    stats = fill(method.needs, correlated(2000, 256, 3), correlated(2000, 256, 5))
    nearest = Gptq(bits=4, group=32, feedback=False).choices(plain, stats)
    for weight in (plain, nearest.build(0).dense().detach()):
        choices = method.choices(weight, stats)
        for i in range(len(choices.errors)):
            measured = choices.error_of(weight - choices.build(i).dense().detach())
            assert measured == pytest.approx(float(choices.errors[i]), rel=0.3, abs=1e-6 * choices.total), i
