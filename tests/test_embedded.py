"""The whole way on real models: what is loaded, compressed, saved and read again in a new process."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rankwise
from rankwise.compressors import KroneckerFactoredSvd, WhitenedSvd
from rankwise.core.statistics import Statistics
from rankwise.core.surgery import select, structured
from rankwise.matrices import LowRank, PivotedLowRank
from rankwise.models import embedded_texts, predicted_bytes, tokens

pytestmark = pytest.mark.slow
FEW = re.compile(r"model\.layers\.\d\.")  # ten of thirty blocks


@pytest.fixture(scope="module")
def smollm() -> tuple:
    return rankwise.load("smollm2-135m", dtype=torch.float32)


@pytest.fixture(scope="module")
def ids(smollm: tuple) -> Tensor:
    return tokens(smollm[1], embedded_texts()["topics"], limit=2048)


@pytest.fixture(scope="module")
def statistics(smollm: tuple, ids: Tensor) -> Statistics:
    return rankwise.calibrate(smollm[0], KroneckerFactoredSvd.needs, data=ids)


@torch.no_grad()
def test_pivoting_loses_nothing_on_trained_weights(smollm: tuple, statistics: Statistics):
    """To 1e-5 in float32, with small coefficients, r (m + n - r) numbers, and fewer multiply-adds."""
    method, sites = WhitenedSvd(gauge="factors"), select(smollm[0])
    for name in [name for name in sites if ".layers.0." in name or ".layers.17." in name]:
        weight = sites[name].weight
        m, n = weight.shape
        r = round(0.5 * min(m, n))
        factors = method.choices(weight, statistics.of(name, method.needs)).build(r - 1)
        assert isinstance(factors, LowRank)
        pivoted = PivotedLowRank.from_factors(factors.left.detach(), factors.right.detach())
        dense = factors.dense()
        assert float((pivoted.dense() - dense).norm() / dense.norm()) < 1e-5
        assert float(pivoted.mix.abs().max()) <= 1.1 + 1e-5
        assert sum(p.numel() for p in pivoted.parameters()) == r * (m + n - r) == pivoted.macs < factors.macs


def test_a_compressed_model_is_the_same_in_a_new_process(
    smollm: tuple, statistics: Statistics, ids: Tensor, tmp_path: Path
):
    model, tokenizer = rankwise.load("smollm2-135m", dtype=torch.float32)
    report = rankwise.compress(
        model, KroneckerFactoredSvd(), keep=0.8, data=statistics, where=lambda name, _: bool(FEW.match(name))
    )
    assert report.totals["keep"]["params"] <= 0.8
    kinds = {row["kind"] for row in report.rows}
    assert kinds == {"Dense", "PivotedLowRank"}
    for row in report.rows:
        assert row["measured_error"] == pytest.approx(row["predicted_error"], rel=1e-2, abs=1e-9)
    expected = predicted_bytes(model)
    folder = rankwise.save(model, tmp_path / "small", tokenizer)
    assert sum(f.stat().st_size for f in folder.glob("*.safetensors")) == pytest.approx(expected, rel=0.005)
    text = embedded_texts()["topics"][-4000:]
    dense, small = (
        rankwise.evaluate(each, tokenizer, {"topics": text}).rows[0]["nats"] for each in (smollm[0], model)
    )
    assert small - dense < 0.5  # calibrated on 2,048 tokens
    with torch.no_grad():
        torch.save(model(ids[None, :64]).logits, tmp_path / "logits.pt")
    torch.save(ids[None, :64], tmp_path / "ids.pt")
    load = "from transformers import AutoModelForCausalLM as A; m = A.from_pretrained('small')"
    check = f"""import torch, rankwise
{load}
logits = m(torch.load('ids.pt')).logits
assert (logits - torch.load('logits.pt')).abs().max() < 1e-5
print(m.generate(torch.load('ids.pt'), max_new_tokens=4).shape)"""
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    without = subprocess.run([sys.executable, "-c", load], capture_output=True, cwd=tmp_path, check=False)
    assert without.returncode != 0


def test_an_encoder_keeps_its_meaning():
    """MiniLM at keep 0.8 still knows which of three sentences is about the same thing."""
    model, tokenizer = rankwise.load("minilm-l6")
    words = embedded_texts()["topics"].split("\n\n")[:200]
    batches = [
        dict(tokenizer(words[i : i + 20], return_tensors="pt", padding=True, truncation=True, max_length=128))
        for i in range(0, 200, 20)
    ]
    report = rankwise.compress(model, KroneckerFactoredSvd(), keep=0.8, data=batches)
    assert len(structured(model)) > 0
    assert report.totals["keep"]["params"] <= 0.8
    batch = tokenizer(
        ["How do I define a function?", "Functions are made with def.", "The cat sat in the sun."],
        return_tensors="pt",
        padding=True,
    )
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    near, far = float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
    assert near > far + 0.2
