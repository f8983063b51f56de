"""Matrices of 3-D parameters in PEFT's files: its layout, and what it cannot compute."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import MIXTURES
from safetensors.torch import load_file, save_file
from tiny import ids
from torch import Generator, nn

import rankwise
from rankwise.adapters import AdaLora, Bat, Householder, Lora
from rankwise.core.adapted import adapted
from rankwise.core.stacks import stacks
from rankwise.models.peft_experts import experts_of

FAMILIES = ["mixtral", "gpt-oss", "llama4"]  # (m, n); (n, m), which is declared; (n, m), which is not
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def experts(name: str, layer: nn.Module) -> bool:
    return ".experts" in name and "shared" not in name


def put(model: Any, method: Any, where: Any = experts, **options: Any) -> Any:
    rankwise.adapt(model, method, where=where, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids()[:4]).logits


def added(tensors: dict[str, torch.Tensor], place: str, shape: torch.Size, declared: bool) -> torch.Tensor:
    """What PEFT 0.21 adds to an (e, a, b) parameter, by its own formula, without the scale."""
    found = (tensors[f"base_model.model.{place}.lora_{letter}.weight"] for letter in "AB")
    right, left = (t.double() for t in found)
    right, left = right.view(shape[0], -1, right.shape[1]), left.view(len(left), -1, shape[0])
    return torch.einsum("oke,eki->eio" if declared else "oke,eki->eoi", left, right)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_is_what_peft_computes(family: str, tmp_path: Path):
    model = put(MIXTURES[family](), Lora(rank=2, alpha=3.0))
    rankwise.save(model, tmp_path / "adapter", format="peft")
    tensors = load_file(tmp_path / "adapter" / TENSORS)
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["target_modules"] == []
    assert sorted(config["target_parameters"]) == ["experts.down_proj", "experts.gate_up_proj"]
    plain = {name: p.detach().double() for name, p in MIXTURES[family]().named_parameters()}
    folded = dict(rankwise.fold(model).named_parameters())
    for path in experts_of(folded_model := MIXTURES[family]()):
        owner, _, name = path.rpartition(".")
        place = f"{owner}.base_layer" if name == "gate_up_proj" else owner  # it comes first in the module
        declared = getattr(folded_model.get_submodule(owner), "is_transposed", False)
        change = config["lora_alpha"] / config["r"] * added(tensors, place, plain[path].shape, declared)
        torch.testing.assert_close((folded[path].double() - plain[path]), change, rtol=1e-4, atol=1e-6)
        assert float(change.abs().max()) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [Lora(rank=2, alpha=3.0), AdaLora(rank=2, target=1)], ids=["lora", "adalora"])
def test_it_is_read_again(family: str, method: Any, tmp_path: Path):
    model, again = put(MIXTURES[family](), method, where=None).eval(), MIXTURES[family]()
    rankwise.save(model, tmp_path / "adapter", format="peft")
    report = rankwise.load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    assert adapted(again).keys() == adapted(model).keys()
    assert report.totals["missing"] == report.totals["unexpected"] == []


def test_experts_of_other_ranks_or_without_an_adapter_get_zeros(tmp_path: Path):
    model, again = MIXTURES["mixtral"](), MIXTURES["mixtral"]()
    for i, name in ((0, "few"), (1, "some")):
        put(
            model,
            Lora(rank=3 - i, alpha=4.0),
            where=lambda path, _, i=i: path.endswith(f"down_proj.{i}"),
            name=name,
        )
    rankwise.use(model, {"few": 0.5, "some": 2.0})
    rankwise.save(model, tmp_path / "adapter", format="peft")
    rankwise.load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    others = [layer.matrix.parts[1] for name, layer in adapted(again).items() if name.endswith("down_proj.2")]
    assert len(others) == 2
    assert not any(bool(other.dense().any()) for other in others)


def test_the_order_of_parameters_outlives_that_of_adapters(tmp_path: Path):
    model, again = MIXTURES["mixtral"](), MIXTURES["mixtral"]()
    for end in ("down_proj", "gate_up_proj"):  # the other way round than in the module
        put(model, Lora(rank=2), where=lambda path, _, end=end: f".{end}." in path, name=end)
    assert [path.rpartition(".")[2] for path, _ in stacks(model)][:2] == ["down_proj", "gate_up_proj"]
    rankwise.use(model, {"down_proj": 1.0, "gate_up_proj": 1.0})
    rankwise.save(model, tmp_path / "adapter", format="peft")
    rankwise.load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    rankwise.load_adapter(model, tmp_path / "adapter", name="third")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Lora(rank=2, magnitudes=True), "rows of trained lengths"),
        (Lora(rank=2, dropout=0.1), "dropout"),
        (Bat(block=8), "low rank"),
    ],
    ids=["dora", "dropout", "bat"],
)
def test_what_peft_does_not_compute_is_refused(method: Any, message: str, tmp_path: Path):
    model = put(MIXTURES["mixtral"](), method)
    with pytest.raises(ValueError, match=message) as caught:
        rankwise.save(model, tmp_path / "adapter", format="peft")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    rankwise.save(model, tmp_path / "adapter", format="rankwise")


def test_changes_of_low_rank_are_written_as_lora(tmp_path: Path):
    model, again = put(MIXTURES["mixtral"](), Householder(rank=2)), MIXTURES["mixtral"]()
    rankwise.save(model, tmp_path / "adapter", format="peft")
    rankwise.load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


def test_damaged_factors_are_named(tmp_path: Path):
    model = put(MIXTURES["mixtral"](), Lora(rank=2))
    folder = rankwise.save(model, tmp_path / "adapter", format="peft")
    tensors = load_file(folder / TENSORS)
    key = next(key for key in tensors if key.endswith("lora_A.weight"))
    tensors[key] = torch.randn(5, tensors[key].shape[1], generator=Generator().manual_seed(0))
    save_file(tensors, folder / TENSORS)
    with pytest.raises(ValueError, match="not those of 3 experts"):
        rankwise.load_adapter(MIXTURES["mixtral"](), folder)
    del tensors[key]
    save_file(tensors, folder / TENSORS)
    with pytest.raises(ValueError, match="lacks tensors"):
        rankwise.load_adapter(MIXTURES["mixtral"](), folder)


def test_streams_send_experts_elsewhere(tmp_path: Path):
    plain = MIXTURES["gpt-oss"]()
    plain.save_pretrained(tmp_path / "base")
    folder = rankwise.save(put(plain, Lora(rank=2)), tmp_path / "adapter", format="peft")
    with pytest.raises(ValueError, match="is a slice of a 3-D parameter; use load_adapter, fold and save"):
        rankwise.export(folder, rankwise.exporters.Merged(base=str(tmp_path / "base")), tmp_path / "merged")
