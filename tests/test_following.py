"""Schedules act by themselves, once a step, in every kind of loop; and nothing trains without them."""

import copy
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.examples import draw
from safetensors.torch import load_file
from torch import Tensor, nn

import rankwise
from rankwise.adapters import AdaLora, Lamda, Lora, Snella, Sst
from rankwise.core.checkpoint import load_tree, save_tree
from rankwise.core.methods import Adapter
from rankwise.linalg import magnitude
from rankwise.matrices import Dense, Kernelled, Scheduled, from_spec

METHODS = {
    "AdaLora": AdaLora(rank=4, target=2, every=3),
    "Lamda": Lamda(rank=4, until=0.5),
    "Snella": Snella(rank=4, density=0.9, target=0.2, every=2, tail=0.2),
    "SnellaMagnitudes": Snella(rank=4, density=0.9, target=0.2, weight=1.0, shrink=magnitude),
    "Sst": Sst(rank=2, hold=2, warmup=1),
}
STEPS = 12


@pytest.fixture(params=sorted(METHODS))
def method(request: pytest.FixtureRequest) -> Adapter:
    return METHODS[request.param]


def adapted_net(method: Adapter) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 8))
    rankwise.adapt(model, method)
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def loss_of(model: nn.Module, i: int) -> Tensor:
    return (model(draw(16, 10, seed=i).float()) - draw(16, 8, seed=90).float()).square().mean()


def begin(method: Adapter, steps: int = STEPS, **options: Any):
    model = adapted_net(method)
    optimizer = torch.optim.AdamW(trained(model), lr=0.02, **options)
    return model, optimizer, rankwise.follow(model, optimizer, steps=steps)


def go(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for i in steps:
        optimizer.zero_grad()
        loss_of(model, i).backward()
        optimizer.step()


def same(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_all_schedules_are_here():
    kinds = {type(method.schedule).__name__ for method in METHODS.values() if hasattr(method, "schedule")}
    assert kinds == set(rankwise.schedules.__all__)


def test_what_nothing_follows_refuses_to_train(method: Adapter):
    model = adapted_net(method)
    with pytest.raises(RuntimeError, match=r"rankwise\.follow"):
        loss_of(model, 0)
    with torch.no_grad():
        loss_of(model, 0)
    assert loss_of(model.eval(), 0).isfinite()
    model.train()
    optimizer = torch.optim.AdamW(trained(model))
    follower = rankwise.follow(model, optimizer, steps=2)
    loss_of(model, 0).backward()
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(RuntimeError, match=r"rankwise\.follow"):
            loss_of(each, 0)
    follower.stop()
    with pytest.raises(RuntimeError, match=r"rankwise\.follow"):
        loss_of(model, 0)
    optimizer.step()
    assert follower.done == 0


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(method: Adapter, tmp_path: Path):
    whole, optimizer, _ = begin(method)
    go(whole, optimizer, range(STEPS))
    for stop in (2, 5, 8):
        model, optimizer, follower = begin(method)
        go(model, optimizer, range(stop))
        states = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "follower": follower.state_dict(),
        }
        save_tree(states, tmp_path / "all")
        states = load_tree(tmp_path / "all")
        model, optimizer, follower = begin(method)
        if stop == 5:  # the follower may be made before the rest is loaded, or after
            follower.stop()
        model.load_state_dict(states["model"])
        optimizer.load_state_dict(states["optimizer"])
        if stop == 5:
            follower = rankwise.follow(model, optimizer, steps=STEPS)
        follower.load_state_dict(states["follower"])
        go(model, optimizer, range(stop, STEPS))
        assert same(model.state_dict(), whole.state_dict())
        assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in whole.parameters()]


def test_a_state_is_tensors_and_plain_values(method: Adapter):
    model, optimizer, follower = begin(method)
    go(model, optimizer, range(3))

    def without_tensors(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: without_tensors(value) for key, value in tree.items()}
        if isinstance(tree, list):
            return [without_tensors(value) for value in tree]
        return tree.tolist() if isinstance(tree, Tensor) else tree

    state = follower.state_dict()
    assert json.loads(json.dumps(without_tensors(state)))["done"] == 3


def test_a_state_of_another_training_is_refused():
    _, _, follower = begin(METHODS["AdaLora"])
    for other in (begin(METHODS["Lamda"]), begin(METHODS["AdaLora"], steps=5)):
        with pytest.raises(ValueError, match=r"other (schedules|steps)"):
            follower.load_state_dict(other[2].state_dict())
    state = begin(METHODS["AdaLora"])[2].state_dict()
    state["layers"] = [["elsewhere"]]
    with pytest.raises(ValueError, match="other layers"):
        follower.load_state_dict(state)


def test_summed_gradients_are_one_step(method: Adapter):
    one, optimizer, follower = begin(method)
    go(one, optimizer, range(STEPS))
    two, optimizer, summed = begin(method)
    for i in range(STEPS):
        optimizer.zero_grad()
        for _ in range(2):
            (loss_of(two, i) / 2).backward()
        optimizer.step()
    assert follower.done == summed.done == STEPS
    assert same(one.state_dict(), two.state_dict())


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_do_not_count(method: Adapter, fused: bool):
    plain, optimizer, _ = begin(method, steps=4, fused=fused)
    go(plain, optimizer, range(4))
    model, optimizer, follower = begin(method, steps=4, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    for i in [0, 1, None, 2, 3]:
        optimizer.zero_grad()
        scaler.scale(loss_of(model, i or 0) * (float("inf") if i is None else 1.0)).backward()
        if fused or i == 1:  # the scaler does it itself otherwise
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert follower.done == 4
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_scaled_gradients_are_refused_where_the_optimiser_would_unscale_them():
    model, optimizer, _ = begin(METHODS["AdaLora"], fused=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(ValueError, match="unscale_"):
        scaler.step(optimizer)


def test_with_accelerate(method: Adapter):
    from accelerate import Accelerator

    plain, optimizer, _ = begin(method)
    go(plain, optimizer, range(STEPS))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = adapted_net(method)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained(model), lr=0.02))
    follower = rankwise.follow(model, optimizer, steps=STEPS)
    for i in range(2 * STEPS):
        with accelerator.accumulate(wrapped):
            accelerator.backward(loss_of(wrapped, i // 2))
            optimizer.step()
            optimizer.zero_grad()
    assert follower.done == STEPS
    assert same(model.state_dict(), plain.state_dict())


def trainer_of(model: nn.Module, folder: Path, **options: Any):
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in torch.arange(160).view(16, 10) % 61 + 3]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_steps=3,
        learning_rate=0.01,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model, arguments, train_dataset=data, **options)


@pytest.mark.slow
def test_with_a_trainer_that_is_given_the_optimiser(tmp_path: Path):
    from tiny import llama

    model = llama()
    rankwise.adapt(model, METHODS["AdaLora"])
    optimizer = torch.optim.AdamW(trained(model), lr=0.01)
    follower = rankwise.follow(model, optimizer, steps=6)
    trainer_of(model, tmp_path, optimizers=(optimizer, None)).train()
    assert follower.done == 6
    assert not rankwise.check_adapters(model, optimizer, follower=follower).totals["problems"]


@pytest.mark.slow
def test_with_a_trainer_that_is_stopped_and_goes_on(method: Adapter, tmp_path: Path):
    from tiny import llama

    states = []
    for again in (False, True):
        model = llama()
        rankwise.adapt(model, method)
        callback = rankwise.trainer_callback()
        trainer = trainer_of(model, tmp_path, callbacks=[callback])
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if again else None)
        assert callback.follower.done == 6
        states.append(model.state_dict())
    moved = (tmp_path / "checkpoint-3").rename(tmp_path / "elsewhere")
    model = llama()
    rankwise.adapt(model, method)
    trainer = trainer_of(model, tmp_path / "new", callbacks=[rankwise.trainer_callback(moved)])
    trainer.train(resume_from_checkpoint=str(moved))
    assert same(*states)
    assert same(states[0], model.state_dict())
    rankwise.finish(model)
    model.train()(torch.ones(1, 4, dtype=torch.long))


@pytest.mark.slow
def test_a_trainer_writes_what_layers_share_once(tmp_path: Path):
    from tiny import llama

    states = []
    for again in (False, True):
        model = llama()
        rankwise.adapt(model, rankwise.adapters.Compacter(reduction=4))
        trainer_of(model, tmp_path).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-3") if again else None
        )
        states.append(model.state_dict())
    shared = [name for name in states[0] if name.endswith("mixers")]
    written = load_file(tmp_path / "checkpoint-6" / "model.safetensors").keys()
    assert [name for name in shared if name in written] == shared[:1]
    assert same(*states)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdaLora", "Sst"])
def test_compiled_without_breaks(name: str):
    torch.compiler.reset()  # the limit of recompilations counts all tests of a process
    plain, optimizer, _ = begin(METHODS[name])
    go(plain, optimizer, range(3))
    model, optimizer, _ = begin(METHODS[name])
    go(torch.compile(model, backend="aot_eager", fullgraph=True), optimizer, range(3))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("layers", [["0"], ["0", "2"]], ids=str)
def test_what_is_frozen_stays_as_it_is(method: Adapter, layers: list[str]):
    model = adapted_net(method)
    with torch.no_grad():
        for i, p in enumerate(trained(model)):
            p += 0.1 * draw(*p.shape, seed=i).float()
    for name in layers:
        model.get_submodule(name).requires_grad_(False)
    model[2].bias.requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    follower = rankwise.follow(model, optimizer, steps=STEPS)
    go(model, optimizer, range(STEPS))
    follower.stop()
    moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert {key.split(".")[0] for key in moved} == {"2"}
    assert (moved == {"2.bias"}) == ("2" in layers)


def test_a_budget_is_that_of_the_layers_that_train():
    model = adapted_net(METHODS["AdaLora"])
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(trained(model), lr=0.02)
    follower = rankwise.follow(model, optimizer, steps=STEPS)
    go(model, optimizer, range(STEPS))
    assert [row["rank"] for row in follower.finish().rows] == [0, 2]  # the first one was zero, and stays so
    model = adapted_net(METHODS["Snella"])
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(trained(model), lr=0.02)
    rankwise.follow(model, optimizer, steps=STEPS)
    go(model, optimizer, range(STEPS))
    kept = [m.kept for m in model.modules() if isinstance(m, Kernelled)]
    assert kept == [round(0.9 * 10 * 12), round(0.2 * 12 * 8)]


def test_two_settings_in_one_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 8))
    rankwise.adapt(model, METHODS["AdaLora"], where=lambda name, _: name == "0")
    first = trained(model)
    rankwise.adapt(model, METHODS["Lamda"], where=lambda name, _: name == "2")
    for p in first:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained(model), lr=0.01)
    follower = rankwise.follow(model, optimizer, steps=4)
    go(model, optimizer, range(4))
    kinds = [schedule["kind"] for schedule in follower.state_dict()["schedules"]]
    assert kinds == ["TripletBudget", "FreezeColumns"]
    assert [row["acted"] for row in rankwise.check_adapters(model).rows] == [4, 4]


def _closure(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: loss_of(model, 0)


def test_bad_use():
    model = adapted_net(METHODS["Lamda"])
    optimizer = torch.optim.AdamW(trained(model))
    with pytest.raises(ValueError, match="steps must be"):
        rankwise.follow(model, optimizer, steps=0)
    with pytest.raises(TypeError, match=r"torch\.optim"):
        rankwise.follow(model, object(), steps=1)
    with pytest.raises(ValueError, match=r"0\.matrix\.members\.1\.matrix.*which a schedule acts on"):
        rankwise.follow(model, torch.optim.SGD(model[2].parameters()), steps=1)
    with pytest.raises(ValueError, match="no adapter"):
        rankwise.follow(nn.Linear(2, 2), optimizer, steps=1)
    rankwise.follow(model, optimizer, steps=1)
    with pytest.raises(ValueError, match="followed already"):
        rankwise.follow(model, optimizer, steps=1)
    with pytest.raises(ValueError, match="followed still"):
        rankwise.finish(model)
    with pytest.raises(ValueError, match="no closure"):
        optimizer.step(_closure(model))


def test_a_followed_model_is_not_folded(method: Adapter):
    model, optimizer, follower = begin(method)
    go(model, optimizer, range(2))
    before = model.state_dict()
    with pytest.raises(ValueError, match=r"layer 0\.matrix\..* is followed still; call finish\(\)"):
        rankwise.fold(model)
    assert model.state_dict().keys() == before.keys()
    follower.stop()
    expected = loss_of(model.eval(), 3)
    torch.testing.assert_close(loss_of(rankwise.fold(model), 3), expected)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"kind": "Path"}, "unknown schedule"),
        ({"kind": "FreezeColumns", "before": 1}, "version"),
        ({"kind": "FreezeColumns", "until": 2.0}, "until must be"),
        ({"kind": "TripletBudget"}, "acts on a Product"),
    ],
)
def test_schedules_from_files_are_checked(schedule: dict, message: str):
    model = adapted_net(Lora(rank=2))
    spec = {"kind": "Scheduled", "matrix": {"kind": "Dense", "shape": [12, 8]}, "schedule": schedule}
    model.append(from_spec(spec))
    with pytest.raises(ValueError, match=message):
        rankwise.follow(model, torch.optim.SGD(model.parameters()), steps=1)
    with pytest.raises(ValueError, match="plain values"):
        Scheduled(Dense(torch.eye(2)), {"kind": "FreezeColumns", "until": [1]})


def test_only_what_is_in_use_is_stepped():
    """Else a regulariser would move an adapter that computes nothing, and its budget would fall."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    rankwise.adapt(model, Lora(rank=2), name="plain")
    rankwise.adapt(model, AdaLora(rank=4, target=2), name="falling")
    rankwise.use(model, "falling")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    follower = rankwise.follow(model, optimizer, steps=10)
    for chosen in ("falling", "plain"):
        rankwise.use(model, chosen)
        optimizer.zero_grad()
        model(torch.ones(3, 6)).square().sum().backward()
        before = {name: p.clone() for name, p in model.named_parameters()}
        if chosen == "falling":
            optimizer.step()
        else:
            with pytest.raises(ValueError, match="not in use"):
                optimizer.step()
            assert same(before, dict(model.named_parameters()))
    assert follower.done == 1


@pytest.mark.parametrize(("steps", "early"), [(3, True), (8, False)])
def test_a_budget_that_was_not_reached_is_told(steps: int, early: bool):
    """Of ten steps the last two change nothing."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    rankwise.adapt(model, AdaLora(rank=3, target=2, warmup=0.1, tail=0.2, every=1))
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    follower = rankwise.follow(model, optimizer, steps=10)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(3, 6)).square().sum().backward()
        optimizer.step()
    if early:
        with pytest.warns(UserWarning, match="budget at step 8 of 10, but training ended after 3"):
            follower.finish()
    else:
        assert follower.finish().totals["rank"] == 4


def test_columns_freeze_among_several_processes_without_ending_their_gradients(monkeypatch: pytest.MonkeyPatch):
    """Which DistributedDataParallel would wait for."""
    found = []
    for several in (False, True):
        monkeypatch.setattr(rankwise.schedules.freeze_columns, "several", lambda several=several: several)
        model = adapted_net(Lamda(rank=4, until=0.5))
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.1)
        follower = rankwise.follow(model, optimizer, steps=8)
        go(model, optimizer, range(8))
        left = [part.matrix.weight for part in model.modules() if isinstance(part, Scheduled)]
        assert [weight.requires_grad for weight in left] == [several] * len(left)
        found.append([p.detach().clone() for p in model.parameters()])
        follower.stop()
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("first", [True, False], ids=["followed first", "layer by layer first"])
def test_steps_within_the_backward_pass_cannot_be_followed(first: bool):
    model = adapted_net(Lamda(rank=4, until=0.5))
    optimizer = rankwise.Optimizer([(trained(model), rankwise.optimizers.adam())], lr=0.02)
    if first:
        follower = rankwise.follow(model, optimizer, steps=3)
        with rankwise.Layerwise(optimizer):
            loss_of(model, 0).backward()
            with pytest.raises(ValueError, match="which are one with Layerwise"):
                optimizer.step()
        go(model, optimizer, range(3))
        follower.stop()
        return
    with rankwise.Layerwise(optimizer), pytest.raises(ValueError, match="which are one with Layerwise"):
        rankwise.follow(model, optimizer, steps=3)
    rankwise.follow(model, optimizer, steps=3).stop()
