"""Training of adapters: in the project's loop, a plain one and those of others; budgets, resume, NaN."""

import copy
import gc
import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import MIXTURES
from tiny import llama
from torch import Tensor, nn

import rankwise
from rankwise import adapters
from rankwise.adapters import AdaLora, Compacter, Eva, Householder, Lora, Snella, Sst
from rankwise.core import running
from rankwise.core.extended import extended
from rankwise.core.labels import given
from rankwise.core.memory import held_bytes, optimizer_bytes, peak_memory_bytes, reset_peak_memory
from rankwise.core.rates import GENERAL, WHOLE, Cosine, Linear
from rankwise.matrices import Kernelled


def batches(count: int = 10, seed: int = 1) -> list[dict[str, Tensor]]:
    """Sequences that count upwards, so that there is something to learn."""
    starts = torch.randint(64, (count, 4, 1), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": ids, "labels": ids} for ids in (starts + torch.arange(12)) % 64]


def tiny(method=None, **changes) -> nn.Module:
    model = llama(**{"initializer_range": 0.1, **changes})
    method = method or Lora(rank=4)
    rankwise.adapt(model, method, data=batches(2) if getattr(method, "needs", ()) else None)
    return model


def numbers(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def own(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model: nn.Module) -> float:
    """The mean loss, in evaluation mode, by the plain formula."""
    model.eval()
    ids = torch.cat([batch["input_ids"] for batch in batches()])
    with torch.no_grad():
        logs = model(input_ids=ids).logits.double()[:, :-1].log_softmax(-1)
    return -logs.gather(2, ids[:, 1:, None]).mean().item()


def test_the_report_says_what_a_formula_measures():
    model, judges = tiny(), batches()
    before, start = numbers(model), loss_of(model)
    report = rankwise.finetune(model, batches(6, seed=2), held_out=judges, lr=0.05, steps=30, accumulate=2)
    told = report.totals["held_out"]
    assert told["before"] == pytest.approx(start, rel=1e-5)
    assert told["after"] == pytest.approx(loss_of(model), rel=1e-5)
    assert told["after"] < 0.9 * told["before"]
    assert changed(model, before) == own(model)
    assert report.totals["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.rows[-1]["rows"] == 30 * 2 * 4 * 11  # tokens that have one before them
    report.to_json()


def test_accumulated_batches_are_one_large_one():
    small, large = tiny(), tiny()
    parts = batches(2)
    parts[0]["labels"] = parts[0]["labels"].clone()
    parts[0]["labels"][:, 3:] = -100  # each label counts the same, not each batch
    whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    options = {"held_out": batches(1, seed=3), "lr": 0.02, "steps": 3, "rate": Linear(0.0)}
    sgd = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.5) for m in (small, large)]
    rankwise.finetune(small, parts, accumulate=2, optimizer=sgd[0], **options)
    rankwise.finetune(large, [whole], optimizer=sgd[1], **options)
    for name, tensor in large.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], tensor)
    assert sgd[0].param_groups[0]["lr"] == 0.5  # as it was


def test_a_plain_loop():
    model, before = tiny(), None
    before, start = numbers(model), loss_of(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for batch in batches() * 2:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert loss_of(model) < start
    assert changed(model, before) == own(model)


def test_the_trainer_of_transformers(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = tiny()
    before, start = numbers(model), loss_of(model)
    rows = [{key: value[0] for key, value in batch.items()} for batch in batches(32)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        learning_rate=0.01,
        max_steps=6,
        per_device_train_batch_size=8,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        activation_checkpointing=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert loss_of(model) < start
    assert changed(model, before) == own(model)


def test_accelerate():
    from accelerate import Accelerator

    model = tiny()
    before, start = numbers(model), loss_of(model)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    wrapped, optimizer, loader = accelerator.prepare(
        model, optimizer, torch.utils.data.DataLoader(batches(16), batch_size=None)
    )
    for batch in loader:
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    model = accelerator.unwrap_model(wrapped)
    assert loss_of(model) < start
    assert changed(model, before) == own(model)


METHODS = {"lora": Lora(rank=4), "magnitudes": Lora(rank=4, magnitudes=True), "eva": Eva(rank=4)}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_an_adapted_model_compiles_without_breaks(method):
    model, (batch,) = tiny(method), batches(1)
    for parameter in model.parameters():
        parameter.data += 0.01 * parameter.requires_grad
    expected = model(**batch, use_cache=False).loss
    gradients = torch.autograd.grad(expected, [p for p in model.parameters() if p.requires_grad])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = compiled(**batch, use_cache=False).loss
    torch.testing.assert_close(found, expected)
    again = torch.autograd.grad(found, [p for p in model.parameters() if p.requires_grad])
    for ours, theirs in zip(again, gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradient_checkpointing_gives_the_same_numbers_and_keeps_less():
    plain, less = tiny(), tiny()
    options = {"held_out": batches(1, seed=3), "lr": 0.02, "steps": 2}
    reports = [
        rankwise.finetune(plain, batches(), **options),
        rankwise.finetune(less, batches(), gradient_checkpointing=True, **options),
    ]
    assert not changed(less, numbers(plain))
    kept = [report.totals["memory"]["activations"] for report in reports]
    assert kept[1] < kept[0]
    assert not less.is_activation_checkpointing


def test_half_precision_under_autocast():
    model = llama().bfloat16()
    rankwise.adapt(model, Lora(rank=4), also=lambda name: "norm" in name)
    start, kinds = loss_of(model), {name: p.dtype for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"norm.* half precision"):
        rankwise.finetune(model, batches())
    report = rankwise.finetune(model, batches(), lr=0.02, steps=8, autocast=torch.bfloat16)
    assert report.totals["improved"]
    assert loss_of(model) < start
    assert {name: p.dtype for name, p in model.named_parameters()} == kinds


def test_memory_is_predicted_by_count():
    model, told = tiny(), []
    report = rankwise.finetune(model, batches(), steps=1, notify=told.append)
    memory = report.totals["memory"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    count = sum(1 for p in model.parameters() if p.requires_grad)
    assert memory["gradients"] == 4 * trained
    assert memory["optimizer"] == 8 * trained + 4 * count  # two moments, and a counter for each parameter
    assert memory["weights"] == 4 * sum(p.numel() for p in model.parameters()) + sum(
        b.nbytes for b in model.buffers()
    )
    parts = [memory[name] for name in ("weights", "gradients", "optimizer", "activations")]
    assert memory["predicted"] == sum(parts) < memory["peak"]
    assert memory == {**told[0], "peak": memory["peak"], "rise": memory["rise"]}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell")
def test_what_is_measured_begins_anew():
    large = torch.ones(50_000_000)  # 200 MB
    assert reset_peak_memory()
    before = peak_memory_bytes()
    del large
    assert reset_peak_memory()
    assert peak_memory_bytes() < before - 150_000_000


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop])
def test_the_state_of_an_optimiser_is_as_large_as_predicted(kind):
    weights = [nn.Parameter(torch.ones(6, 5)), nn.Parameter(torch.ones(3))]
    optimizer = kind(weights, lr=0.1)
    predicted = optimizer_bytes(kind(copy.deepcopy(weights), lr=0.1))
    sum(w.square().sum() for w in weights).backward()
    optimizer.step()
    held = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    assert predicted == sum(tensor.nbytes for tensor in held)
    assert optimizer_bytes(torch.optim.Adafactor(weights)) is None  # asks for values


def test_activations_are_what_backward_needs():
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    net[2].requires_grad_(False)
    net[0].bias.requires_grad_(False)
    x, y = torch.ones(7, 6, dtype=torch.float64), torch.zeros(7, dtype=torch.long)
    report = rankwise.finetune(net, [(x, y)], held_out=[(x, y)], steps=1)
    logits = 4 * 7 * 2  # log-probabilities of the loss, in float32, and the labels and their count below
    assert report.totals["memory"]["activations"] == 8 * 7 * 6 + 8 * 7 * 5 + logits + 8 * 7 + 4
    assert held_bytes(net) == report.totals["memory"]["weights"] == 8 * (30 + 5 + 10 + 2)


def test_nothing_of_a_run_is_held_when_it_is_over():
    def held() -> int:
        gc.collect()
        return sum(issubclass(type(each), Tensor) for each in gc.get_objects())

    rankwise.finetune(tiny(), batches(), steps=1)  # makes what is made once
    before = held()
    rankwise.finetune(tiny(), batches(), steps=1)
    assert held() == before


@pytest.mark.parametrize("stop", [4, 9])
def test_an_interrupted_run_goes_on_bit_by_bit(tmp_path, monkeypatch, stop):
    fresh = tiny(Lora(rank=4, dropout=0.2))
    options = {"held_out": 0.2, "lr": 0.02, "steps": 12, "every": 3, "accumulate": 2}
    whole = copy.deepcopy(fresh)
    expected = rankwise.finetune(whole, batches(), checkpoint=tmp_path / "whole", **options)
    step, calls = running.Run._step, itertools.count(1)

    def interrupted(self):
        if next(calls) == stop:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(running.Run, "_step", interrupted)
    first = copy.deepcopy(fresh)
    with pytest.raises(KeyboardInterrupt):
        rankwise.finetune(first, batches(), checkpoint=tmp_path / "halves", **options)
    if stop > 6:
        assert changed(first, numbers(fresh)) == own(fresh)  # the work is kept
    monkeypatch.setattr(running.Run, "_step", step)
    shutil.copytree(tmp_path / "halves", tmp_path / "copy")
    for model, folder in ((fresh, "halves"), (first, "copy")):  # a new process, and the interrupted one
        torch.rand(3)  # what others draw makes no difference
        report = rankwise.finetune(model, batches(), checkpoint=tmp_path / folder, **options)
        assert not changed(model, numbers(whole))
        assert [{**row, "seconds": 0} for row in report.rows] == [{**row, "seconds": 0} for row in expected.rows]


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 8])
@pytest.mark.parametrize("name", [None, pytest.param("snella", marks=pytest.mark.slow)])
def test_a_schedule_that_was_interrupted_goes_on_bit_by_bit(tmp_path, monkeypatch, stop, name):
    fresh = llama(initializer_range=0.1)
    rankwise.adapt(fresh, Snella(rank=2, density=0.9, target=0.2), name=name)
    options = {"held_out": 0.2, "lr": 0.02, "steps": 12, "every": 3, "accumulate": 2}
    whole = copy.deepcopy(fresh)
    expected = rankwise.finetune(copy.deepcopy(fresh), batches(), **options)
    rankwise.finetune(whole, batches(), checkpoint=tmp_path / "whole", **options)
    step, calls = running.Run._step, itertools.count()

    def interrupted(self):
        if next(calls) == stop:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(running.Run, "_step", interrupted)
    first = copy.deepcopy(fresh)
    with pytest.raises(KeyboardInterrupt):
        rankwise.finetune(first, batches(), checkpoint=tmp_path / "halves", **options)
    monkeypatch.setattr(running.Run, "_step", step)
    looks = [row for row in expected.rows if row["step"] <= stop]
    kept = [part.kept for part in first.modules() if isinstance(part, Kernelled)]
    start = [part.kept for part in fresh.modules() if isinstance(part, Kernelled)]
    assert (kept == start) == (stop < 3)  # the entries of the last look
    again = rankwise.finetune(copy.deepcopy(first), batches(), **options).totals["held_out"]["before"]
    assert again == looks[-1]["held_out"]  # they belong to its numbers
    shutil.copytree(tmp_path / "halves", tmp_path / "copy")
    other = llama(initializer_range=0.1)
    rankwise.adapt(other, Snella(rank=2, density=0.8, target=0.2), name=name)
    with pytest.raises(ValueError, match=r"is about another .* \(other adapters\)"):
        rankwise.finetune(other, batches(), checkpoint=tmp_path / "copy", **options)
    for model, folder in ((fresh, "halves"), (first, "copy")):
        report = rankwise.finetune(model, batches(), checkpoint=tmp_path / folder, **options)
        assert not changed(model, numbers(whole))
        assert [part.kept for part in model.modules() if isinstance(part, Kernelled)] == [
            part.kept for part in whole.modules() if isinstance(part, Kernelled)
        ]
        assert [{**row, "seconds": 0} for row in report.rows] == [{**row, "seconds": 0} for row in expected.rows]


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    options: Any = {"steps": 2, "checkpoint": tmp_path, "rate": lambda done: 1.0, "loss": lambda *x: given(*x)}
    rankwise.finetune(tiny(), batches(), **options)
    moved = tiny()
    moved.model.norm.weight.data += 1
    for model, data, more, words in (
        (moved, batches(), {}, r" \(other model\)"),
        (tiny(Lora(rank=2)), batches(), {}, r" \(other adapters\)"),
        (tiny(Lora(rank=4, alpha=3.0)), batches(), {}, r" \(other adapters\)"),
        (tiny(Lora(rank=4, dropout=0.5)), batches(), {}, r" \(other adapters\)"),
        (tiny(), batches(seed=4), {}, r" \(other data\)"),
        (tiny(), batches(), {"lr": 1e-3, "clip": 2.0}, r" \(other clip, lr\)"),
        (tiny(), batches(), {"rate": lambda done: 0.5}, r" \(other rate\)"),
        (tiny(), batches(), {"loss": lambda *x: 2 * given(*x)}, r" \(other loss\)"),
    ):
        with pytest.raises(ValueError, match=f"is about another model, reference, data or setting{words};"):
            rankwise.finetune(model, data, **{**options, **more})


def test_a_step_that_is_not_finite_is_skipped_loudly():
    model, calls = tiny(), itertools.count()

    def broken(output, batch, generator):
        return given(output, batch, generator) * (float("nan") if next(calls) in bad else 1.0)

    bad = {6}
    options = {"held_out": batches(1, seed=3), "lr": 0.02, "steps": 8, "loss": broken}
    with pytest.warns(RuntimeWarning, match="not finite; the step is skipped"):
        assert rankwise.finetune(model, batches(), **options).totals["improved"]
    calls, bad = itertools.count(), set(range(6, 10**6))
    with (
        pytest.warns(RuntimeWarning, match="skipped"),
        pytest.raises(ValueError, match="3 steps in a row; lower the learning rate"),
    ):
        rankwise.finetune(model, batches(), **options)
    assert all(tensor.isfinite().all() for tensor in numbers(model).values())


def test_frozen_batch_normalisations_stay_and_trained_ones_go_back_to_the_best():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    data = [(torch.randn(8, 1, 6, 6), torch.randint(2, (8,))) for _ in range(6)]
    rankwise.adapt(net, Lora(rank=2))
    before = numbers(net)
    rankwise.finetune(net, data, lr=0.02, steps=6)
    assert changed(net, before) <= own(net)
    net[1].requires_grad_(True)
    report = rankwise.finetune(net, data, lr=10.0, clip=None, steps=6)  # far too fast: the start is the best
    assert not report.totals["improved"]
    assert report.totals["best_step"] == 0


@pytest.mark.parametrize(
    "method", [Lora(rank=4), AdaLora(rank=4, target=1, every=1), Compacter(reduction=4), Householder(rank=2)]
)
@pytest.mark.parametrize("steps", [1, 3])
def test_adapters_are_looked_at_after_the_first_steps(method: object, steps: int):
    model = tiny(method)
    names = [*rankwise.core.adapted.adapted(model), *extended(model)]
    found = rankwise.finetune(model, batches(), lr=1e-3, steps=steps, every=1).totals["adapters"]
    assert found["title"] == f"{len(names)} adapted layers train"
    assert [row["name"] for row in found["layers"]] == names
    left = [row for row in found["layers"] if row["change"] > 0]  # AdaLoRA may leave nothing of a layer
    assert left if isinstance(method, AdaLora) else left == found["layers"]
    assert all(row["gradient"] > 0 for row in found["layers"])
    assert found["steps"] == min(steps, 2)
    assert found["problems"] == {}


def test_a_layer_that_does_not_train_is_warned_of():
    class Deaf(nn.Module):
        """Two layers, of which one is heard."""

        def __init__(self) -> None:
            super().__init__()
            self.heard, self.unheard = nn.Linear(4, 8), nn.Linear(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.heard(x) + self.unheard(x).detach()

    data = [(torch.randn(8, 4), torch.randint(8, (8,))) for _ in range(6)]
    torch.manual_seed(0)
    net = Deaf()
    rankwise.adapt(net, Lora(rank=2))
    with pytest.warns(RuntimeWarning, match="1 of 2 adapted layers have a problem: unheard: the gradient"):
        report = rankwise.finetune(net, data, lr=0.01, steps=4)
    assert list(report.totals["adapters"]["problems"]) == ["unheard"]
    net = Deaf()
    rankwise.adapt(net, Lora(rank=2), where=lambda name, _: name == "unheard", also=lambda n: n == "heard.bias")
    before = numbers(net)
    with pytest.raises(ValueError, match="no adapter trains: 1 of 1 adapted layers have a problem: unheard"):
        rankwise.finetune(net, data, lr=0.01, steps=4)
    assert changed(net, before) <= {"heard.bias"}


@pytest.mark.parametrize("idle", [1, 5])
def test_steps_at_a_rate_of_zero_say_nothing(idle: int):
    model = tiny()
    found = rankwise.finetune(
        model, batches(), lr=1e-3, steps=8, every=1, rate=lambda done: float(done * 8 >= idle)
    ).totals["adapters"]
    assert found["problems"] == {}
    assert found["steps"] == idle + 2
    with pytest.raises(ValueError, match="no adapter trains"):
        rankwise.finetune(tiny(), batches(), steps=4, every=1, rate=lambda done: 0.0)


@pytest.mark.parametrize("family", ["mixtral", "qwen3 moe"])
def test_experts_that_no_token_reached_are_no_problem(family: str):
    model = MIXTURES[family]()
    experts = len(rankwise.adapt(model, Lora(rank=2), where=lambda name, _: ".experts." in name).rows)
    one = torch.full((1, 2), 5)  # two equal tokens go to the same experts
    report = rankwise.finetune(model, [one, one, one], held_out=[one], lr=1e-3, steps=3, every=1)
    found = report.totals["adapters"]
    assert 0 < len(found["unreached"]) < experts
    assert found["problems"] == {}
    number = experts - len(found["unreached"])
    assert found["title"].startswith(
        f"{number} adapted layers train; no token reached {experts - number} experts"
    )
    for row in found["layers"]:
        assert (row["change"] == 0) == (row["name"] in found["unreached"])


def test_an_expert_that_was_reached_once_is_no_problem():
    model = MIXTURES["qwen3 moe"]()
    rankwise.adapt(model, Lora(rank=2), where=lambda name, _: ".experts." in name)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    follower = rankwise.follow(model.train(), optimizer, steps=2)
    for token in (5, 9):  # which go to other experts
        optimizer.zero_grad()
        model(torch.full((1, 2), token), labels=torch.full((1, 2), token)).loss.backward()
        optimizer.step()
    report = rankwise.check_adapters(model, optimizer, follower=follower)
    left = [p for p in follower.silent.values() if p.grad is None or not p.grad.any()]
    assert left
    assert report.totals["problems"] == {}


def test_without_adapters_nothing_is_looked_at():
    net = nn.Sequential(nn.Linear(4, 2))
    data = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(4)]
    assert rankwise.finetune(net, data, steps=2).totals["adapters"] is None


@pytest.mark.slow
@pytest.mark.parametrize("method", [Compacter(reduction=4), Householder(rank=2), Lora(rank=2), Sst(rank=2)])
def test_learning_rates_are_those_that_adapters_suggest(method: Any, tmp_path: Path):
    model = llama()
    rankwise.adapt(model, method, also=lambda name: "norm" in name)
    rankwise.save(model, tmp_path / "adapter", format="rankwise")
    again = llama()
    rankwise.load_adapter(again, tmp_path / "adapter")
    expected = sorted({method.lr or GENERAL, GENERAL})
    for each in (copy.deepcopy(model), again):
        report = rankwise.finetune(each, batches(), steps=1)
        assert sorted(report.totals["lr"]) == expected
    seen, names = [], {id(p): name for name, p in model.named_parameters()}

    class Watched(torch.optim.AdamW):
        """Remembers its groups."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            seen.extend(self.param_groups)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Watched)
        rankwise.finetune(model, batches(), steps=1)
    found = {names[id(p)]: group["lr"] for group in seen for p in group["params"] if id(p) in names}
    assert {rate for name, rate in found.items() if "norm" in name} == {GENERAL}
    assert {rate for name, rate in found.items() if "norm" not in name} == {method.lr or GENERAL}
    assert rankwise.finetune(again, batches(), steps=1, lr=0.01).totals["lr"] == [0.01]


def test_without_adapters_the_learning_rate_is_smaller():
    assert rankwise.finetune(llama(), batches(), steps=1).totals["lr"] == [WHOLE]


def test_every_adapter_says_where_its_learning_rate_is_from():
    for name in adapters.__all__:
        kind = getattr(adapters, name)
        assert kind.lr is None or kind.lr > 0
        told = " ".join(kind.__doc__.split())
        assert "Learning rate: " in told
        first = told.split("Learning rate: ")[1].split(",")[0]
        assert kind.lr is None or float(first) == kind.lr


def test_rates_go_up_and_down():
    assert [round(Cosine(0.1)(x), 3) for x in (0.0, 0.1, 0.55, 1.0)] == [0.01, 1.0, 0.5, 0.0]
    assert [round(Linear(0.1)(x), 3) for x in (0.0, 0.1, 0.55, 1.0)] == [0.01, 1.0, 0.5, 0.0]
    assert Cosine(0.0)(0.0) == 1.0
    with pytest.raises(ValueError, match="warmup must be >= 0 and < 1, got 1"):
        Cosine(1.0)


def test_training_stops_when_it_gets_no_better():
    model, judges = tiny(), batches(2)
    turned = [{**batch, "labels": batch["labels"].flip(1)} for batch in batches()]  # counts downwards instead
    report = rankwise.finetune(model, turned, held_out=judges, lr=0.05, steps=40, every=1, patience=3)
    best = min(row["held_out"] for row in report.rows)
    assert report.totals["steps"] == report.totals["best_step"] + 3 < 40
    assert report.totals["held_out"]["after"] == best < report.rows[-1]["held_out"]
    assert report.totals["stopped"] == "the held-out loss stopped falling"
    assert rankwise.finetune(model, turned, held_out=judges, steps=1).rows[0]["held_out"] == best


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate must be >= 1, got 0"),
        ({"held_out": 1.0}, "held_out must be > 0 and < 1, or batches"),
        ({"held_out": []}, "held_out is empty"),
        ({"steps": 0}, "steps must be >= 1 and whole, got 0"),
        ({"every": 0}, "every must be >= 1 and whole, got 0"),
        ({"clip": -1.0}, "clip must be positive"),
        ({"patience": 0}, "patience must be >= 1"),
        ({"data": batches(1)}, "two batches or more"),
        ({"data": [{"input_ids": torch.ones(1, 1, dtype=torch.long)}] * 2}, "no label that counts"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        rankwise.finetune(tiny(), **{"data": batches(3), **options})


def test_nothing_to_train_and_nothing_to_checkpoint():
    with pytest.raises(ValueError, match=r"call rankwise.adapt first"):
        rankwise.finetune(llama().requires_grad_(False), batches())
    net = nn.Sequential(nn.Linear(4, 2))
    with pytest.raises(ValueError, match="Sequential has no activation_checkpointing_enable"):
        rankwise.finetune(net, [(torch.ones(3, 4), torch.zeros(3).long())] * 2, gradient_checkpointing=True)
