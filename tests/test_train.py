"""Training of whole models: the rule for groups, memory, exact resume, layer by layer, half precision."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from mixtures import MIXTURES
from tiny import ids, llama
from torch import Tensor, nn

import rankwise
from rankwise import Optimizer, parameter_groups
from rankwise.compressors import PlainSvd
from rankwise.core import running
from rankwise.core.checkpoint import load_tree
from rankwise.core.hidden import hidden_matrices
from rankwise.core.memory import held_bytes
from rankwise.core.preconditioner import Preconditioner
from rankwise.core.running import Run
from rankwise.core.supervised import Supervised
from rankwise.core.transforms import Transform
from rankwise.linalg import expanded
from rankwise.optimizers import adam, batched, galore, muon, transposed
from rankwise.preconditioners import MFac, Sngd


def counting() -> Tensor:
    """Tokens that count upwards, so that there is something to learn."""
    return torch.arange(4000) % 64


def tiny(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return llama(**{"initializer_range": 0.1, **changes}).to(dtype)


def over(model: nn.Module, transform: Transform, **options: Any) -> Optimizer:
    return Optimizer(parameter_groups(model, transform, **options), lr=0.02)


def trained(transform: Transform = galore(rank=4, every=4), dtype: torch.dtype = torch.float32, **options: Any):  # noqa: B008
    model = tiny(dtype)
    report = rankwise.train(
        model, counting(), over(model, transform), **{"window": 32, "steps": 12, "every": 4, **options}
    )
    return model, report


def same(one: nn.Module, two: nn.Module) -> bool:
    other = two.state_dict()
    return all(torch.equal(value, other[name]) for name, value in one.state_dict().items())


def test_attention_and_mlp_matrices_are_hidden():
    """In a Llama with a head of its own; embeddings, head and norms are not."""
    model = tiny(tie_word_embeddings=False)
    names = {name.split(".")[-2] for name in hidden_matrices(model)}
    assert names == {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")}
    hidden, tables, vectors = parameter_groups(model, muon(), lr=0.1, other_lr=0.2, weight_decay=0.3)
    assert len(hidden["params"]) == 14
    assert [name for name, _ in tables["params"]] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert all("norm" in name for name, _ in vectors["params"])
    rates = [(group["lr"], group["weight_decay"]) for group in (hidden, tables, vectors)]
    assert rates == [(0.1, 0.3), (0.2, 0.3), (0.2, 0.0)]
    assert (hidden["transform"], tables["transform"], vectors["transform"]) == (muon(), adam(), adam())
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    assert [name for name, _ in parameter_groups(model, muon())[0]["params"]] == ["lm_head.weight"]


def test_structured_matrices_and_stacked_experts_are_hidden():
    model = tiny()
    rankwise.compress(model, PlainSvd(), keep=0.5, where=lambda name, _: name.endswith("up_proj"))
    found = [name for name in hidden_matrices(model) if "up_proj" in name]
    assert found
    assert all(".matrix." in name for name in found)
    for name, transform in (("mixtral", batched(muon())), ("gpt-oss", batched(transposed(muon())))):
        mixture = MIXTURES[name]()
        stacked = {path for path, p in mixture.named_parameters() if p.ndim == 3}
        (group,) = (
            each for each in parameter_groups(mixture, muon()) if stacked & {path for path, _ in each["params"]}
        )
        assert {path for path, _ in group["params"]} == stacked
        assert group["transform"] == transform
        still = {
            path
            for each in parameter_groups(mixture, muon(), weight_decay=0.1)
            for path, _ in each["params"]
            if each["weight_decay"] == 0
        }
        assert still >= {path for path, p in mixture.named_parameters() if "bias" in path}
    with pytest.raises(ValueError, match="how matrices are kept is found out here"):
        parameter_groups(mixture, batched(muon()))


def test_what_is_stored_as_in_by_out_steps_so():
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    )
    hidden = parameter_groups(model, muon())[0]
    assert hidden["transform"] == transposed(muon())
    assert {name.rpartition(".")[0].rpartition(".")[2] for name, _ in hidden["params"]} == {
        "c_attn",
        "c_fc",
        "c_proj",
    }


@pytest.mark.parametrize(("steps", "looks"), [(3, 3), (10, 10), (19, 10), (21, 7)])
def test_there_are_at_most_ten_looks(steps: int, looks: int):
    """Beside the one before the first step; the last is at the end."""
    _, report = trained(adam(), steps=steps, every=None)
    assert len(report.rows) == 1 + looks
    assert report.rows[-1]["step"] == steps


def test_it_learns_and_says_what_it_took():
    seen: dict[str, list[int]] = {}
    told: list[Any] = []

    def observe(step: int, figures: Any) -> None:
        for name in figures:
            seen.setdefault(name, []).append(step)

    model, report = trained(steps=30, every=10, observe=observe, notify=told.append, clip=1.0)
    held = report.totals["held_out"]
    assert held["after"] < 0.7 * held["before"]
    assert report.rows[-1]["held_out"] == held["after"]
    assert seen == {"train": [*range(1, 31)], "lr": [*range(1, 31)], "held_out": [0, 10, 20, 30]}
    memory = report.totals["memory"]
    optimizer = over(model, galore(rank=4, every=4))
    assert memory["optimizer"] == optimizer.state_bytes()
    assert memory["gradients"] == sum(p.nbytes for p in model.parameters())
    assert told[0]["predicted"] == sum(told[0][k] for k in ("weights", "gradients", "optimizer", "activations"))
    assert memory["peak"] > 0
    report.to_json()


def test_no_second_copy_is_held(monkeypatch: pytest.MonkeyPatch):
    """Not of the best numbers, nor for the checkpoint."""
    copies = []
    copy = Run._copy
    monkeypatch.setattr(Run, "_copy", lambda self: copies.append(1) or copy(self))
    _, report = trained()
    assert not copies
    assert report.totals["best_step"] == report.totals["steps"]


@pytest.mark.parametrize("options", [{}, {"layerwise": True}, {"layerwise": True, "clip": 0.5}], ids=str)
def test_a_killed_run_goes_on_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
):
    """In the middle of a period of refreshes and of a pass over the data."""
    whole, report = trained(every=3, **options)
    step, calls = running.Run._step, itertools.count(1)

    def killed(self: Run) -> Any:
        if next(calls) == 9:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(running.Run, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(every=3, checkpoint=tmp_path, **options)
    monkeypatch.setattr(running.Run, "_step", step)
    again, second = trained(every=3, checkpoint=tmp_path, **options)
    assert same(whole, again)
    history = [[row[key] for key in ("step", "train", "held_out")] for row in report.rows]
    assert history == [[row[key] for key in ("step", "train", "held_out")] for row in second.rows]
    with pytest.raises(ValueError, match="another model"):
        trained(muon(), every=3, checkpoint=tmp_path, **options)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_layer_by_layer_is_the_same(clip: float | None):
    one, report = trained(clip=clip)
    two, other = trained(clip=clip, layerwise=True)
    assert same(one, two)
    assert report.rows[-1]["held_out"] == other.rows[-1]["held_out"]
    table, largest = 64 * 32 * 4, 48 * 32 * 4  # the tied embedding is complete only at the end
    assert other.totals["memory"]["gradients"] == table + largest
    assert all(p.grad is None for p in two.parameters())


def test_accumulated_layer_by_layer_is_the_same():
    one, _ = trained(accumulate=3, steps=5)
    two, _ = trained(accumulate=3, steps=5, layerwise=True)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, None), (torch.float32, torch.bfloat16)])
def test_half_precision(dtype: torch.dtype, autocast: torch.dtype | None):
    model, report = trained(dtype=dtype, autocast=autocast, steps=20, gradient_checkpointing=True)
    held = report.totals["held_out"]
    assert held["after"] < 0.9 * held["before"]
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert report.totals["memory"]["weights"] == held_bytes(model) >= sum(p.nbytes for p in model.parameters())


def test_batches_and_judges_may_be_given():
    model, data = tiny(), list(ids().split(2))
    report = rankwise.train(model, data[1:], over(model, adam()), held_out=data[:1], steps=2)
    assert report.totals["rows"] == 2 * 2 * 19


def test_a_loss_that_is_lost_at_the_end_is_no_success(tmp_path: Path):
    """No better numbers are kept to go back to; the checkpoint before stays."""
    model = tiny()

    def lose(step: int, figures: Any) -> None:
        if step == 4 and "train" in figures:
            model.lm_head.weight.data.fill_(float("nan"))

    sizes = {"window": 32, "steps": 4, "every": 2}
    with pytest.raises(ValueError, match="step 4: the held-out loss is nan"):
        rankwise.train(model, counting(), over(model, adam()), checkpoint=tmp_path, observe=lose, **sizes)
    (file,) = tmp_path.iterdir()
    assert load_tree(file)["progress"]["step"] == 2


def test_wrong_arguments():
    model = tiny()
    optimizer = over(model, adam())
    for options, words in (
        ({"held_out": 1.5}, "held_out must be > 0 and < 1"),
        ({"accumulate": 0}, "accumulate must be >= 1"),
        ({"rows": 0}, "rows must be >= 1"),
        ({"window": 1}, "window must be >= 2"),
        ({"layerwise": True, "accumulate": 2, "clip": 1.0}, "leave clip out"),
    ):
        with pytest.raises(ValueError, match=words):
            rankwise.train(model, counting(), optimizer, **options)
    with pytest.raises(ValueError, match=r"lacks model\.embed_tokens"):
        rankwise.train(model, counting(), Optimizer([(model.model.norm.parameters(), adam())], lr=0.1))
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"layerwise needs a rankwise\.Optimizer"):
        rankwise.train(model, counting(), plain, layerwise=True)
    rankwise.adapt(model, rankwise.adapters.Lora(rank=2))
    with pytest.raises(ValueError, match="train the adapter with finetune"):
        rankwise.train(model, counting(), plain)


def test_weights_that_train_as_integers_go_on_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def run(checkpoint: Path | None) -> Any:
        model = tiny()
        rankwise.train_as_integers(model)
        groups = parameter_groups(model, galore(rank=4, every=4), lr=0.05, other_lr=0.01)
        optimizer = Optimizer(groups, lr=0.05, write=rankwise.IntegerWeights(model))
        rankwise.train(model, counting(), optimizer, window=32, steps=12, every=4, checkpoint=checkpoint)
        return model

    whole, original, looks = run(None), Run._save, itertools.count(1)

    def stopping(self: Run) -> None:
        original(self)
        if next(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_save", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    monkeypatch.setattr(Run, "_save", original)
    assert same(run(tmp_path), whole)


class TestPrecondition:
    """Natural gradients in the loop: before clipping, in checkpoints, and in the report."""

    def run(self, steps: int = 9, method: Preconditioner | None = None, **options: Any) -> tuple[Any, Any, Any]:
        model = tiny()
        handle = rankwise.precondition(model, method or Sngd(damping=0.3, every=2, sharing=expanded))
        report = rankwise.train(
            model,
            counting(),
            over(model, adam()),
            **{"window": 8, "rows": 2, "steps": steps, "every": 3, "precondition": handle, **options},
        )
        return model, report, handle

    def test_it_learns_and_says_what_it_took(self):
        _, report, handle = self.run(20, clip=1.0)
        held, found = report.totals["held_out"], report.totals["precondition"]
        assert held["after"] < 0.8 * held["before"]
        assert (found["steps"], found["skipped"], found["layers"]) == (20, 0, 14)
        assert found["method"] == {
            "kind": "Sngd",
            **{"damping": 0.3, "every": 2, "together": False, "sharing": "expanded"},
        }
        assert found["phases"] == handle.traffic()
        assert found["phases"]["apply"]["times"] == 20
        assert found["phases"]["invert"]["times"] == 10
        report.to_json()

    def test_what_is_clipped_are_natural_gradients_of_all_batches_of_a_step(self):
        """With much damping they are gradients divided by it, and clipped they are as long as those."""
        found = []
        for damping, clip in ((None, 1e-5), (1e4, 1e-5), (1e4, None)):
            model = tiny()
            parameters = [p for name, p in model.named_parameters() if "_proj" in name]
            others = [p for name, p in model.named_parameters() if "_proj" not in name]
            for parameter in others:
                parameter.requires_grad_(False)
            handle = None if damping is None else rankwise.precondition(model, Sngd(damping=damping))
            optimizer = torch.optim.SGD(parameters, lr=1e4)
            options: dict[str, Any] = {"steps": 1, "accumulate": 3, "rate": lambda share: 1.0, "clip": clip}
            rankwise.train(model, counting(), optimizer, window=8, rows=2, precondition=handle, **options)
            found.append(torch.cat([p.detach().flatten() for p in parameters]))
        start = torch.cat([p.detach().flatten() for name, p in tiny().named_parameters() if "_proj" in name])
        plain, clipped, free = (each - start for each in found)
        assert plain.norm() == pytest.approx(0.1, rel=1e-3)
        torch.testing.assert_close(clipped, plain, rtol=0.0, atol=0.02 * plain.abs().max().item())
        assert free.norm() > 2 * clipped.norm()

    def test_a_step_is_that_of_a_loop_by_hand(self):
        """The natural gradient of the mean over tokens, by the curvature of tokens, then clipped."""
        ends = []
        for by_hand in (False, True):
            model = tiny()
            method = Sngd(damping=1e-3, sharing=expanded)
            handle = rankwise.precondition(model, method)
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            data = [counting()[:16].view(2, 8), counting()[3:9].view(1, 6)]
            if by_hand:
                labels = [batch[:, 1:].numel() for batch in data]
                for batch in data:
                    logits = model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1)
                    targets = batch[:, 1:].flatten()
                    (nn.functional.cross_entropy(logits, targets, reduction="sum") / sum(labels)).backward()
                plain = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
                handle.step(positions=sum(labels) / 3)
                taken = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
                assert nn.functional.cosine_similarity(taken, plain, dim=0) < 0.9
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
            else:
                batches = [{"input_ids": batch, "use_cache": False} for batch in data]
                options: dict[str, Any] = {"steps": 1, "accumulate": 2, "rate": lambda share: 1.0, "clip": 0.1}
                rankwise.train(model, batches, optimizer, held_out=[*batches], precondition=handle, **options)
            ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        start = torch.cat([p.detach().flatten() for p in tiny().parameters()])
        torch.testing.assert_close(ends[0] - start, ends[1] - start, rtol=1e-3, atol=1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize("interrupted", ["_step", "backward"])
    def test_a_killed_run_goes_on_bit_by_bit(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: str
    ):
        """Between two looks at the samples, and in a backward pass, of which the samples are then dropped."""
        whole, report, _ = self.run(accumulate=2)
        place, name = (running.Run, "_step") if interrupted == "_step" else (Tensor, "backward")
        function, calls = getattr(place, name), itertools.count(1)

        def killed(self: Any, *more: Any) -> Any:
            found = function(self, *more)
            if next(calls) == 10:
                raise KeyboardInterrupt
            return found

        with monkeypatch.context() as patch:
            patch.setattr(place, name, killed)
            if interrupted == "_step":
                calls = itertools.count(6)
            with pytest.raises(KeyboardInterrupt):
                self.run(accumulate=2, checkpoint=tmp_path)
        again, second, handle = self.run(accumulate=2, checkpoint=tmp_path)
        assert same(whole, again)
        assert handle.steps == 9
        assert [row["held_out"] for row in report.rows] == [row["held_out"] for row in second.rows]
        with pytest.raises(ValueError, match=r"another model.*\(other precondition\)"):
            self.run(accumulate=2, checkpoint=tmp_path, method=Sngd(damping=0.4, every=2, sharing=expanded))
        with pytest.raises(ValueError, match=r"another model.*\(other precondition\)"):
            self.run(accumulate=2, checkpoint=tmp_path, precondition=None)

    def test_recomputed_activations_change_nothing(self):
        one, _, _ = self.run(accumulate=2)
        other, _, _ = self.run(accumulate=2, gradient_checkpointing=True)
        torch.testing.assert_close(one.state_dict(), other.state_dict())

    def test_half_precision(self):
        _, report, handle = self.run(steps=20, autocast=torch.bfloat16)
        assert report.totals["held_out"]["after"] < report.totals["held_out"]["before"]
        kept = [t for tensors in handle.curvature.values() for t in tensors.values() if t.dim()]
        assert {t.dtype for t in kept if t.is_floating_point()} == {torch.float32}

    def test_steps_that_are_not_finite_are_passed_over(self, monkeypatch: pytest.MonkeyPatch):
        loss, calls = Supervised.loss, itertools.count()

        def sometimes(self: Supervised, model: nn.Module) -> Tensor:
            found = loss(self, model)
            return found * float("nan") if found.requires_grad and next(calls) == 4 else found

        monkeypatch.setattr(Supervised, "loss", sometimes)
        with pytest.warns(RuntimeWarning, match="the step is skipped"):
            _, report, handle = self.run()
        assert (handle.steps, handle.skipped) == (8, 1)
        assert report.totals["precondition"]["skipped"] == 1

    def test_the_handle_must_know_all_processes(self, monkeypatch: pytest.MonkeyPatch):
        model = tiny()
        handle = rankwise.precondition(model, Sngd())
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        with pytest.raises(ValueError, match="knows 1 of 2 processes; make it after"):
            rankwise.train(model, counting(), over(model, adam()), steps=1, precondition=handle)

    def test_its_memory_is_predicted(self):
        told: list[Any] = []
        _, report, handle = self.run(1, method=MFac(gradients=50, damping=1.0), notify=told.append)
        kept = sum(t.nbytes for tensors in handle.curvature.values() for t in tensors.values())
        assert told[0]["precondition"] == kept
        assert told[0]["predicted"] == sum(size for name, size in told[0].items() if name != "predicted")
        assert report.totals["memory"]["precondition"] == kept

    def test_types_in_a_report_and_what_none_can_say(self):
        _, report, _ = self.run(2, method=MFac(gradients=2, damping=1.0, storage=torch.bfloat16))
        assert report.totals["precondition"]["method"]["storage"] == "torch.bfloat16"
        around = torch.ones(1)
        with pytest.raises(ValueError, match="reports and checkpoints can say"):
            self.run(2, method=Sngd(damping=lambda step: float(around)), observe=lambda *_: pytest.fail("began"))

    def test_what_is_refused(self):
        with pytest.raises(ValueError, match="leave out layerwise or precondition"):
            self.run(layerwise=True)
        with pytest.raises(ValueError, match="the handle of another model"):
            self.run(precondition=rankwise.precondition(tiny(), Sngd()))


NORMALISED = {
    "without weights": lambda: nn.BatchNorm1d(8, affine=False),
    "with weights": lambda: nn.BatchNorm1d(8),
    "spectral": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
}


@pytest.mark.parametrize("kind", NORMALISED)
def test_what_is_counted_beside_weights_is_trained_and_gone_on_with(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(16, 6, generator=generator) for _ in range(12)]
    data = [(x, (x[:, 0] > 0).long()) for x in inputs]

    def run(**options: Any) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), NORMALISED[kind](), nn.Tanh(), nn.Linear(8, 2))
        before = {name: b.clone() for name, b in net.named_buffers()}
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        rankwise.train(net, data, optimizer, held_out=data[:2], steps=10, every=3, **options)
        assert before
        assert not any(torch.equal(b, before[name]) for name, b in net.named_buffers())
        return net

    whole, step, calls = run(), running.Run._step, itertools.count(1)

    def killed(self: Run) -> Any:
        if next(calls) == 8:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(running.Run, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint=tmp_path)
    assert same(whole, run(checkpoint=tmp_path))


@pytest.mark.parametrize("kept_aside", [[], torch.arange(40).view(2, 20), 0.0], ids=["none", "a tensor", "zero"])
def test_what_is_kept_aside_is_checked(kept_aside: Any):
    with pytest.raises((TypeError, ValueError), match="held_out"):
        trained(held_out=kept_aside)


def test_an_optimiser_whose_step_cannot_be_tried_is_trained_with_all_the_same():
    class Strict(torch.optim.AdamW):
        ready = False

        def step(self, closure: Any = None) -> Any:
            if not self.ready:
                raise Exception("not in train mode")
            return super().step(closure)

    model = tiny()
    optimizer = Strict(model.parameters())
    optimizer.ready = True
    report = rankwise.train(model, counting(), optimizer, window=32, steps=2)
    assert report.totals["memory"]["optimizer"] is None
