"""onnxruntime computes from an exported file what the model computes."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from structures import STRUCTURES, bert, filled, left_behind, low_rank, output, pivoted, quantized
from tiny import llama
from torch import Tensor, nn

import rankwise
from rankwise.exporters import Onnx
from rankwise.exporters import onnx as module
from rankwise.matrices import Quantized


def computed(folder, **inputs: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    return torch.from_numpy(session.run(None, {name: x.numpy() for name, x in inputs.items()})[0])


def weights(folder) -> int:
    return sum(int(np.prod(t.dims)) for t in onnx.load(folder / "model.onnx").graph.initializer)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 48))


@pytest.mark.slow
def test_a_module_of_any_kind_keeps_its_factors(tmp_path):
    image = torch.randn(4, 3, 8, 8)
    small = filled(net(), low_rank)
    before = {name: t.clone() for name, t in small.state_dict().items()}
    outs = [rankwise.export(small, Onnx(fold=f, example=(image,)), tmp_path / str(f)) for f in (False, True)]
    for batch in (1, 7):
        image = torch.randn(batch, 3, 8, 8)
        wanted = small(image).detach()
        for out in outs:
            torch.testing.assert_close(computed(out, input_0=image), wanted, rtol=1e-4, atol=1e-4)
    assert weights(outs[0]) < weights(outs[1]) / 3
    assert all(torch.equal(t, before[name]) for name, t in small.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("structures", [(), STRUCTURES], ids=["dense", "each structure in some layers"])
def test_decoders_have_equal_logits(structures, tmp_path):
    small = filled(llama(), *structures) if structures else llama()
    rankwise.save(small, tmp_path / "small")
    out = rankwise.export(tmp_path / "small", Onnx(), tmp_path / "out")
    ids = torch.randint(64, (3, 11))
    torch.testing.assert_close(computed(out, input_ids=ids), output(small, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_narrower_decoder_has_equal_logits(tmp_path):
    small, ids = llama(), torch.randint(64, (3, 11))
    rankwise.narrow(small, keep=0.5, data=ids, multiple_of=8)
    rankwise.save(small, tmp_path / "small")
    out = rankwise.export(tmp_path / "small", Onnx(), tmp_path / "out")
    torch.testing.assert_close(computed(out, input_ids=ids), output(small, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_encoders_have_equal_states_with_padding(tmp_path):
    small = filled(bert(), low_rank, pivoted)
    out = rankwise.export(small, Onnx(), tmp_path / "out")
    ids = torch.randint(64, (3, 9))
    mask = (torch.arange(9) < torch.tensor([[9], [4], [7]])).long()
    found = computed(out, input_ids=ids, attention_mask=mask)
    with torch.no_grad():
        wanted = small(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_what_cannot_be_exported_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="bfloat16"):
        rankwise.export(llama().bfloat16(), Onnx(), tmp_path / "out")
    with pytest.raises(ValueError, match=r"Sequential.*example"):
        rankwise.export(net(), Onnx(), tmp_path / "out")
    with pytest.raises(ValueError, match="cannot be traced"):
        rankwise.export(net(), Onnx(example=(torch.randn(4, 5),)), tmp_path / "out")
    monkeypatch.setattr(module, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="does not compute the same"):
        rankwise.export(net(), Onnx(example=(torch.randn(2, 3, 8, 8),)), tmp_path / "out")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"rankwise\[onnx\]"):
        rankwise.export(net(), Onnx(example=(torch.randn(2, 3, 8, 8),)), tmp_path / "out")
    assert left_behind(tmp_path) == []


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1e-5, 1e5])
def test_outputs_of_any_size_are_compared(factor, tmp_path, monkeypatch):
    example = torch.randn(4, 32)
    scaled = nn.Sequential(nn.Linear(32, 8), Times(factor))
    rankwise.export(scaled, Onnx(example=(example,)), tmp_path / "sound")

    def save_another(model: nn.Module, *others: Any) -> None:
        save(nn.Sequential(scaled[0], Times(factor / 2)), *others)

    save = module._save
    monkeypatch.setattr(module, "_save", save_another)
    with pytest.raises(ValueError, match="does not compute the same"):
        rankwise.export(scaled, Onnx(example=(example,)), tmp_path / "other")


class Difference(nn.Module):
    """Nothing but rounding, as the same sums are taken in two orders."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(2048, 8, bias=False), nn.Linear(4096, 8, bias=False)
        self.other.weight = nn.Parameter(torch.cat([self.one.weight.detach()] * 2, -1))

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) - self.other(torch.cat([x / 2, x / 2], -1))


def test_what_cancels_may_differ_by_rounding(tmp_path):
    torch.manual_seed(0)
    rankwise.export(Difference(), Onnx(example=(torch.randn(16, 2048),)), tmp_path / "out")


def test_a_model_with_nothing_to_fold_is_named(tmp_path):
    with pytest.raises(ValueError, match="no structured layer to fold"):
        rankwise.export(net(), Onnx(fold=True, example=(torch.randn(2, 3, 8, 8),)), tmp_path / "out")


def test_a_matrix_that_is_a_module_of_its_own_stays_in_the_model(tmp_path):
    torch.manual_seed(0)
    small, x = nn.Sequential(quantized(8, 32), nn.ReLU()), torch.randn(2, 32)
    out = rankwise.export(small, Onnx(example=(x,)), tmp_path / "out")
    torch.testing.assert_close(computed(out, input_0=x), small(x), rtol=1e-4, atol=1e-4)
    assert isinstance(small[0], Quantized)


def test_low_bit_matrices_in_expressions_are_written_out_in_a_copy(tmp_path):
    small = filled(nn.Sequential(nn.Linear(32, 8)), quantized)
    rankwise.export(small, Onnx(example=(torch.randn(2, 32),)), tmp_path / "out")
    assert type(small[0].matrix).__name__ == "Quantized"  # pyright: ignore[reportIndexIssue]
    x = torch.randn(5, 32)
    torch.testing.assert_close(computed(tmp_path / "out", input_0=x), small(x).detach(), rtol=1e-4, atol=1e-4)
