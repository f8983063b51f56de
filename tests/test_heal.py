"""Healing: what it improves, what it leaves alone, budgets, exact resume, and everything that may go wrong."""

import copy
import itertools
import shutil

import pytest
import torch
from tiny import llama
from torch import Tensor, nn

import rankwise
from rankwise import CalibrationError
from rankwise.compressors import Gptq, GptqPlusLowRank, KroneckerFactoredSvd, OrthogonalDictionary, PlainSvd
from rankwise.core import running
from rankwise.core.surgery import StructuredLinear, structured
from rankwise.core.targets import Probabilities, target_of
from rankwise.matrices import LowRank
from rankwise.training import BACK


def ids(tokens: int = 512, seed: int = 1) -> Tensor:
    return torch.randint(0, 64, (tokens,), generator=torch.Generator().manual_seed(seed))


def sharp() -> nn.Module:
    """A model whose predictions depend on its input, unlike those of a fresh one."""
    return llama(initializer_range=0.3)


def pair(method=None, of="params", keep=0.6) -> tuple[nn.Module, nn.Module]:
    """A compressed model and the model before."""
    dense, small = sharp(), sharp()
    rankwise.compress(small, method or PlainSvd(), keep=keep, data=ids(), of=of)
    return small, dense


def heal(small, dense, **options):
    sizes = {"data": ids(), "window": 32, "rows": 128, "steps": 12, "every": 3, "lr": 1e-4}
    return rankwise.heal(small, dense, **{**sizes, **options})


def numbers(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_report_says_what_an_evaluation_measures():
    small, dense = pair()
    held_text = ids(seed=5)
    before = rankwise.evaluate(small, None, {"x": held_text}, window=32, dense=dense).rows[0]["kl"]
    report = heal(small, dense, steps=24)
    after = rankwise.evaluate(small, None, {"x": held_text}, window=32, dense=dense).rows[0]["kl"]
    told = report.totals["held_out"]
    assert report.totals["improved"]
    assert told["after"] < told["before"]
    assert after < before
    assert told["after"] == min(row["held_out"] for row in report.rows)
    assert report.totals["trained"] == sum(p.numel() for x in structured(small).values() for p in x.parameters())
    report.to_json()


def test_only_the_matrices_change():
    small, dense = pair()
    before, reference = numbers(small), numbers(dense)
    flags = {name: p.requires_grad for name, p in small.named_parameters()}
    small.train()
    heal(small, dense)
    assert small.training
    assert all(p.requires_grad == flags[name] and p.grad is None for name, p in small.named_parameters())
    changed = {name for name, tensor in numbers(small).items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name, p in small.named_parameters() if ".matrix." in name}
    assert same(numbers(dense), reference)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Gptq(group=16, bits=2), GptqPlusLowRank(group=16), OrthogonalDictionary()])
def test_every_structure_heals(kind):
    small, dense = pair(kind, of="bytes", keep=0.7)
    report = heal(small, dense, data=ids(4096), rows=512)
    assert report.totals["improved"]


def test_it_trains_where_gradients_are_off():
    small, dense = pair()
    with torch.no_grad():
        assert heal(small, dense).totals["improved"]


def test_a_learning_rate_that_ruins_the_model_gives_the_start_back():
    small, dense = pair(keep=0.95)  # near enough to the dense one that no chance step makes it better
    before = numbers(small)
    report = heal(small, dense, lr=0.3, patience=2)
    assert same(numbers(small), before)
    assert not report.totals["improved"]
    assert report.totals["stopped"] == "the held-out divergence stopped falling"
    assert "no better than the start" in report.title
    assert report.totals["steps"] == 6


def test_after_a_look_that_is_worse_it_goes_on_from_the_best_numbers_more_slowly(monkeypatch):
    small, dense = pair()
    step, seen = running.Run._step, []

    def watched(self):
        best = all(torch.equal(self.best[name], tensor) for name, tensor in self.trained.items())
        loss = step(self)
        seen.append((best, self.progress.share))
        return loss

    monkeypatch.setattr(running.Run, "_step", watched)
    report = heal(small, dense, lr=0.1, steps=24, patience=8)
    held, best, share = [row["held_out"] for row in report.rows], float("inf"), 1.0
    for look, value in enumerate(held[:-1]):
        share *= 1.0 if value < best else BACK
        best = min(value, best)
        assert seen[3 * look][0]  # a better look is the best one; after a worse one the best is put back
        assert not seen[3 * look + 1][0]
        assert seen[3 * look][1] == pytest.approx(share)
    assert share < 1
    assert report.totals["improved"]


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "lr"), [(5, 1e-4), (9, 1e-4), (4, 0.1), (9, 0.1)])
def test_an_interrupted_run_goes_on_bit_by_bit(tmp_path, monkeypatch, stop, lr):
    whole, dense = pair()
    fresh = copy.deepcopy(whole)
    expected = heal(whole, dense, checkpoint=tmp_path / "whole", lr=lr)
    step, calls = running.Run._step, itertools.count(1)

    def interrupted(self):
        if next(calls) == stop:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(running.Run, "_step", interrupted)
    first = copy.deepcopy(fresh)
    with pytest.raises(KeyboardInterrupt):
        heal(first, dense, checkpoint=tmp_path / "halves", lr=lr)
    monkeypatch.setattr(running.Run, "_step", step)
    shutil.copytree(tmp_path / "halves", tmp_path / "copy")
    for model, folder in ((fresh, "halves"), (first, "copy")):  # a new process, and the interrupted one
        report = heal(model, dense, checkpoint=tmp_path / folder, lr=lr)
        assert same(numbers(model), numbers(whole))
        untimed = [[{**row, "seconds": 0} for row in each.rows] for each in (report, expected)]
        assert untimed[0] == untimed[1]


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    small, dense = pair()
    other = pair(keep=0.5)[0]
    moved = copy.deepcopy(small)
    next(iter(structured(moved).values())).matrix.kept.data += 1
    heal(copy.deepcopy(small), dense, checkpoint=tmp_path, steps=3)
    for model, options in ((other, {}), (moved, {}), (small, {"data": ids(seed=9)}), (small, {"rows": 64})):
        with pytest.raises(ValueError, match="another model, reference, data or setting"):
            heal(model, dense, checkpoint=tmp_path, **{"steps": 3, **options})
    (tmp_path / "healing.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"damaged .* remove it to start anew"):
        heal(small, dense, checkpoint=tmp_path, steps=3)


@pytest.mark.slow
def test_the_time_budget_ends_the_run_and_counts_what_was_spent_before(tmp_path, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(running.time, "perf_counter", lambda: float(next(ticks)))
    small, dense = pair()
    call = {"steps": None, "budget": 100.0, "patience": 100, "checkpoint": tmp_path}
    report = heal(small, dense, **call)
    assert report.totals["stopped"] == "the budget is spent"
    assert 95 <= report.totals["seconds"] < 110
    assert heal(small, dense, **call).totals["steps"] == report.totals["steps"]


def test_a_step_that_is_not_finite_is_skipped_loudly(monkeypatch):
    small, dense = pair()
    divergence, calls = Probabilities.divergence, itertools.count()

    def broken(self, output, batch):
        return divergence(self, output, batch) * (float("nan") if next(calls) in bad else 1.0)

    monkeypatch.setattr(Probabilities, "divergence", broken)
    bad = {4}
    with pytest.warns(RuntimeWarning, match="not finite; the step is skipped"):
        report = heal(small, dense, every=1)
    assert report.totals["improved"]
    losses = [row["train"] for row in report.rows[1:]]
    assert [loss is None for loss in losses].count(True) == 1  # a step that is skipped has no loss
    calls, bad = itertools.count(), set(range(16, 10**6))
    with (
        pytest.warns(RuntimeWarning, match="skipped"),
        pytest.raises(ValueError, match="3 steps in a row; lower the learning rate"),
    ):
        heal(small, dense)
    assert all(tensor.isfinite().all() for tensor in numbers(small).values())


def test_a_model_that_is_broken_from_the_start_is_refused():
    small, dense = pair()
    next(iter(structured(small).values())).matrix.kept.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite before the first step"):
        heal(small, dense)


def test_other_parameters_are_trained_if_asked():
    small, dense = pair()
    before = numbers(small)
    report = heal(small, dense, also=lambda name: "norm" in name)
    changed = {name for name, tensor in numbers(small).items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name, p in small.named_parameters() if ".matrix." in name or "norm" in name}
    assert report.totals["improved"]


@pytest.mark.slow
def test_half_precision_is_trained_in_float32_and_rounded():
    small, dense = pair()
    small, dense = small.bfloat16(), dense.bfloat16()
    texts = {"x": ids()}
    before = rankwise.evaluate(small, None, texts, window=32, dense=dense).rows[0]["kl"]
    report = heal(small, dense, lr=3e-3, steps=24, autocast=torch.bfloat16)
    assert report.totals["improved"]
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert rankwise.evaluate(small, None, texts, window=32, dense=dense).rows[0]["kl"] < 0.95 * before


def test_biases_are_trained_if_asked_and_shared_matrices_once():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    dense[2].weight, dense[2].bias = dense[0].weight, dense[0].bias
    small = copy.deepcopy(dense)
    rankwise.compress(small, KroneckerFactoredSvd(gauge="factors"), keep=0.5, data=[torch.randn(64, 8)])
    data = [torch.randn(32, 8) for _ in range(8)]
    bias = small[0].bias.clone()
    heal(small, dense, data=data)
    assert torch.equal(small[0].bias, bias)
    report = heal(small, dense, data=data, also=lambda name: name.endswith("bias"))
    assert not torch.equal(small[0].bias, bias)
    assert small[0].matrix is small[2].matrix
    assert report.totals["trained"] == small[0].matrix.params + 8


def test_features_are_matched_where_there_are_no_logits():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 6)

        def forward(self, x):
            return {"state": self.inner(x)}

    torch.manual_seed(0)
    dense, data = Encoder(), [torch.randn(32, 8) for _ in range(4)]
    small = copy.deepcopy(dense)
    u, s, v = dense.inner.weight.data.svd()
    small.inner = StructuredLinear(LowRank(0.5 * u[:, :3] * s[:3], v[:, :3].mT.contiguous()), dense.inner.bias)
    with torch.no_grad():
        error = sum(float((dense(x)["state"] - small(x)["state"]).square().sum() / 2) for x in data)
        told = sum(float(target_of(dense(x), x).divergence(small(x), x)) for x in data)
    assert told == pytest.approx(error)
    assert heal(small, dense, data=data, lr=1e-2).totals["improved"]


@pytest.mark.parametrize("kept", [3, 8, 100])
def test_the_divergence_takes_the_unlikely_classes_as_one(kept):
    torch.manual_seed(0)
    p, q = (torch.randn(5, 8, dtype=torch.float64).softmax(-1) for _ in range(2))
    target = Probabilities.of(p.log(), kept)
    order = p.argsort(dim=-1, descending=True)
    few = min(kept, 8)
    ps, qs = p.gather(1, order)[:, :few], q.gather(1, order)[:, :few]
    expected = (ps * (ps / qs).log()).sum()
    if few < 8:
        rest = 1 - ps.sum(1), 1 - qs.sum(1)
        expected += (rest[0] * (rest[0] / rest[1]).log()).sum()
    logits = (q.log() + 3).requires_grad_()
    found = target.divergence(logits, None)
    assert found.item() == pytest.approx(float(expected), rel=1e-9)
    (3 * found).backward()
    same_q = logits.detach().requires_grad_()
    logs = same_q.log_softmax(-1)
    plain = (ps * (ps.log() - logs.gather(1, order)[:, :few])).sum()
    if few < 8:
        plain = plain + (rest[0] * (rest[0].log() - logs.gather(1, order[:, few:]).logsumexp(1))).sum()
    plain.backward()
    torch.testing.assert_close(logits.grad, 3 * same_q.grad)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": 0}, ValueError, "positive number of seconds, got 0"),
        ({"steps": 0}, ValueError, "steps must be >= 1 and whole, got 0"),
        ({"rows": 0}, ValueError, "rows must be >= 1"),
        ({"held_out": 1.0}, ValueError, "held_out must be > 0 and < 1"),
        ({"data": "text"}, ValueError, "tokenize a text first"),
        ({"data": ids(20)}, CalibrationError, "two batches or more"),
    ],
)
def test_bad_input_is_named(options, error, message):
    with pytest.raises(error, match=message):
        heal(*pair(), **options)


def test_nothing_to_heal():
    with pytest.raises(ValueError, match="no structured matrix to heal"):
        heal(sharp(), sharp())


def test_other_parameters_must_be_there():
    small, dense = pair()
    with pytest.raises(ValueError, match="'also' accepts no parameter"):
        heal(small, dense, also=lambda name: "zzz" in name)


@pytest.mark.parametrize("lr", [0.0, -1.0, float("inf"), float("nan")])
def test_a_learning_rate_is_a_positive_number(lr):
    small, dense = pair()
    with pytest.raises(ValueError, match="lr must be a number > 0"):
        heal(small, dense, lr=lr)
    rankwise.adapt(dense, rankwise.adapters.Lora(rank=2))
    with pytest.raises(ValueError, match="lr must be a number > 0"):
        rankwise.finetune(dense, [torch.zeros(1, 4, dtype=torch.long)] * 2, lr=lr)
