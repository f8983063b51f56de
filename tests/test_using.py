"""Several adapters in whole models: which is in use, who trains, and what refuses."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import MIXTURES
from tiny import gpt2, ids, llama
from torch import nn

import rankwise
from rankwise import adapters
from rankwise.adapters import AdaLora, Bat, Lamda, Lora
from rankwise.compressors import KroneckerFactoredRounding, PlainSvd
from rankwise.core.adapted import adapted, own_tensors, suggested_rates
from rankwise.core.rates import GENERAL
from rankwise.core.surgery import structured
from rankwise.matrices import Base, Several
from rankwise.models.evaluate import sizes


def attention(name: str, layer: nn.Module) -> bool:
    return name.endswith(("q_proj", "c_attn"))


def feed_forward(name: str, layer: nn.Module) -> bool:
    return name.endswith(("q_proj", "down_proj", "c_fc", "c_attn"))


def moved(model: nn.Module) -> Any:
    """The model with other values of what trains."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def put(model: Any, method: Any, **options: Any) -> Any:
    rankwise.adapt(model, method, **options)
    return moved(model).eval()


def both(build: Any = llama, **options: Any) -> Any:
    """A model with two adapters, of other kinds and on other layers."""
    model = put(build(), Lora(rank=2), name="poet", where=attention, **options)
    return put(model, Lora(rank=3, magnitudes=True), name="coder", where=feed_forward, **options)


def logits(model: Any, x: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(ids()[:4] if x is None else x).logits


@pytest.mark.parametrize("build", [llama, gpt2])
def test_rows_of_a_batch_are_computed_as_alone(build):
    model = both(build)
    choice = ["poet", None, "coder", {"poet": 0.5, "coder": 0.5}]
    wanted = []
    for each, row in zip(choice, ids()[:4], strict=True):
        rankwise.use(model, each)
        wanted.append(logits(model, row[None])[0])
    rankwise.use(model, choice)
    torch.testing.assert_close(logits(model), torch.stack(wanted), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted[0], wanted[2], atol=1e-2)


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_generate_with_a_cache_and_beams(beams: int):
    model, prompts = both(), ids()[:3, :6]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 2}
    choice, wanted = ["poet", None, "coder"], []
    for each, row in zip(choice, prompts, strict=True):
        with rankwise.use(model, each):
            wanted.append(model.generate(row[None], min_new_tokens=6, **options)[0])
    with rankwise.use(model, [each for each in choice for _ in range(beams)]):
        found = model.generate(prompts, min_new_tokens=6, **options)
    assert torch.equal(found, torch.stack(wanted))
    assert len({tuple(row[6:].tolist()) for row in found}) > 1


def test_rows_look_up_their_own_embeddings():
    model = llama(tie_word_embeddings=False)
    options: dict[str, Any] = {"where": lambda name, layer: "embed" in name, "embeddings": True}
    for name in ("poet", "coder"):
        put(model, Lora(rank=2), name=name, seed=len(name), **options)
    wanted = []
    for each, row in zip(["coder", "poet", None], ids()[:3], strict=True):
        with rankwise.use(model, each):
            wanted.append(logits(model, row[None])[0])
    rankwise.use(model, ["coder", "poet", None])
    torch.testing.assert_close(logits(model, ids()[:3]), torch.stack(wanted), rtol=1e-4, atol=1e-5)


def test_rows_of_images():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5)
    )
    for name in ("poet", "coder"):
        put(net, Lora(rank=2), name=name, seed=len(name))
    images = torch.randn(3, 3, 6, 6)
    wanted = []
    for each, image in zip(["coder", None, "poet"], images, strict=True):
        rankwise.use(net, each)
        wanted.append(net(image[None])[0])
    rankwise.use(net, ["coder", None, "poet"])
    torch.testing.assert_close(net(images), torch.stack(wanted), rtol=1e-4, atol=1e-5)
    rankwise.use(net, {"poet": 1.0, "coder": 0.5})
    before = net(images)
    torch.testing.assert_close(rankwise.fold(net)(images), before, rtol=1e-4, atol=1e-5)


def test_rows_train_each_their_own():
    model = both()
    rankwise.use(model, ["poet", "coder"])
    model(ids()[:2], labels=ids()[:2]).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    losses = []
    for each, row in zip(["poet", "coder"], ids()[:2], strict=True):
        rankwise.use(model, each)
        losses.append(model(row[None], labels=row[None]).loss / 2)
    sum(losses).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-6)


def test_rows_in_half_precision_and_under_autocast():
    model = both()
    exact = logits(rankwise.use(model, ["poet", None, "coder", "poet"]) and model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = logits(model)
    close = {"rtol": 0.1, "atol": 0.05 * float(exact.abs().max())}
    torch.testing.assert_close(cast.float(), exact, **close)
    half = copy.deepcopy(model).bfloat16()
    torch.testing.assert_close(logits(half).float(), exact, **close)


def test_the_base_is_multiplied_once():
    model = both()
    several = next(layer.matrix for layer in structured(model).values() if len(layer.matrix.names) == 2)
    calls = []
    several.base.matrix.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(3, 5, 32)
    for choice in (None, "poet", "coder", {"poet": 0.3, "coder": 0.3}, ["poet", "coder", None]):
        rankwise.use(model, choice)
        several.adapters["coder"].row_lengths = lambda: torch.ones(
            several.shape[0]
        )  # it has a product of its own
        calls.clear()
        several(x)
        assert len(calls) == 1


def test_only_rows_of_an_adapter_go_through_it():
    model = both()
    several = next(layer.matrix for layer in structured(model).values() if len(layer.matrix.names) == 2)
    seen = []
    several.adapters["poet"].parts[1].register_forward_hook(lambda part, args, y: seen.append(args[0].shape))
    rankwise.use(model, ["poet", "coder", None, "poet"])
    logits(model)
    assert seen == [(2, 20, 32)]


def test_the_bases_are_one_and_never_change():
    model = both()
    before = llama().state_dict()
    rankwise.use(model, {"poet": 0.5, "coder": 0.5})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(ids()[:2], labels=ids()[:2]).loss.backward()
    optimizer.step()
    for name, layer in adapted(model).items():
        bases = {id(part.matrix) for part in layer.matrix.modules() if isinstance(part, Base)}
        assert len(bases) == 1
        assert torch.equal(layer.matrix.base.dense(), before[f"{name}.weight"])
    held = sum(p.numel() for p in model.parameters())
    own = sum(t.numel() for layer in adapted(model).values() for t in own_tensors(layer.matrix).values())
    buffers = sum(b.numel() for layer in adapted(model).values() for b in layer.matrix.buffers())
    assert held + buffers == sum(p.numel() for p in llama().parameters()) + own


def test_layers_of_one_adapter_alone():
    model, names = both(), {"poet": 2, "coder": 4}
    assert {name: len(layers) for name, layers in rankwise.adapters_of(model).items()} == names
    rankwise.use(model, "poet")
    alone = put(llama(), Lora(rank=2), where=attention)
    assert torch.equal(logits(model), logits(alone))
    assert rankwise.check_adapters(model).totals["problems"] == {}
    assert len(rankwise.check_adapters(model).rows) == 2
    rankwise.remove_adapter(model, "coder")
    assert list(adapted(model)) == list(adapted(alone))
    assert torch.equal(logits(model), logits(alone))
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear


def test_a_new_one_is_made_for_the_model_without_others():
    model, alone = put(llama(), Lora(rank=2), name="poet"), llama()
    for each, name in ((model, "coder"), (alone, None)):
        rankwise.adapt(each, adapters.Eva(rank=2), name=name, data=[ids()])
    assert torch.equal(logits(model), logits(alone))
    own = [[p for p in each.parameters() if p.requires_grad] for each in (model, alone)]
    assert all(torch.equal(one, two) for one, two in zip(*own, strict=True))


def test_shared_numbers_train_again_after_a_switch():
    model = both()
    left, right = (model.model.layers[i].self_attn.q_proj.matrix.adapters["poet"].parts[1] for i in (0, 1))
    right.matrix.left = left.matrix.left
    for choice in ("poet", None, "coder", "poet"):
        rankwise.use(model, choice)
    assert left.matrix.left.requires_grad


def test_what_is_frozen_stays_so_after_a_switch():
    model = both()
    rankwise.use(model, "poet")
    frozen = model.model.layers[0].self_attn.q_proj.matrix.adapters["poet"].parts[1].matrix.left
    frozen.requires_grad_(False)
    for choice in ("coder", "poet"):
        rankwise.use(model, choice)
    assert not frozen.requires_grad
    assert next(p for p in model.parameters() if p.requires_grad).shape == (2, 32)


def test_a_with_puts_back_what_was_in_use():
    model = both()
    rankwise.use(model, {"poet": 0.2})
    before = logits(model)
    with pytest.raises(ZeroDivisionError), rankwise.use(model, ["poet", "coder"]):
        raise ZeroDivisionError
    assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="rank"):
        rankwise.adapt(model, Lora(rank=500), name="wide")
    assert torch.equal(logits(model), before)
    assert list(rankwise.adapters_of(model)) == ["poet", "coder"]


def test_a_new_one_is_in_the_mode_of_the_model():
    model = put(llama(), Lora(rank=2), name="poet")
    put(model, Lora(rank=2, dropout=0.9), name="coder")
    assert not any(part.training for part in model.modules())
    assert torch.equal(logits(model), logits(model))


def test_sizes_count_the_base_once():
    model = llama()
    rankwise.compress(model, KroneckerFactoredRounding(bits=4), keep=0.2, of="bytes", data=list(ids().split(6)))
    before = sizes(model)
    for name, rank in (("poet", 2), ("coder", 3)):
        rankwise.adapt(model, Lora(rank=rank), name=name)
    more = sum(t.numel() for layer in adapted(model).values() for t in own_tensors(layer.matrix).values())
    for choice in ("poet", None, ["poet", {"poet": 0.5, "coder": 0.5}]):
        rankwise.use(model, choice)
        after = sizes(model)
        assert after["params"] == before["params"] + more
        assert after["bytes"] == before["bytes"] + 4 * more
        assert (after["macs_per_token"] > before["macs_per_token"]) == (choice is not None)


def test_layers_that_share_a_weight_share_their_adapters():
    model = llama()
    first, second = (model.model.layers[i].self_attn for i in (0, 1))
    second.q_proj.weight = first.q_proj.weight
    plain = copy.deepcopy(model)
    both(lambda: model)
    assert first.q_proj.matrix is second.q_proj.matrix
    for name in ("poet", "coder"):
        rankwise.remove_adapter(model, name)
    assert first.q_proj.weight is second.q_proj.weight
    assert torch.equal(logits(model), logits(plain))


def test_compressed_models_have_several_too(tmp_path: Path):
    model = llama()
    rankwise.compress(model, PlainSvd(), keep=0.8)
    plain = copy.deepcopy(model)
    both(lambda: model)
    with rankwise.use(model, None):
        assert torch.equal(logits(model), logits(plain))
    again = copy.deepcopy(plain)
    rankwise.save(model, tmp_path / "poet", format="rankwise", name="poet")
    rankwise.load_adapter(again, tmp_path / "poet", name="poet")
    rankwise.use(model, "poet")
    assert torch.equal(logits(again), logits(model))


def test_experts_switch_and_sum_but_have_no_rows():
    model = MIXTURES["mixtral"]()
    before = logits(model)
    for name, method in (("poet", Lora(rank=2)), ("coder", Bat(block=8))):
        put(model, method, name=name, where=lambda name, layer: "experts" in name)
    one, other = ({name: layer.matrix for name, layer in adapted(model).items()} for _ in range(2))
    assert one.keys() == other.keys()
    rankwise.use(model, {"poet": 0.5, "coder": 0.5})
    summed = logits(model)
    torch.testing.assert_close(logits(rankwise.fold(copy.deepcopy(model))), summed, rtol=1e-4, atol=1e-5)
    rankwise.use(model, None)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"experts.*is an expert.* a batch of their own"):
        rankwise.use(model, ["poet", None, None, None])
    put(model, Lora(rank=2), name="attention", where=attention)
    rankwise.use(model, ["attention", None, None, None])
    assert not torch.allclose(logits(model)[0], before[0], atol=1e-3)
    torch.testing.assert_close(logits(model)[1:], before[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_without_adapters_are_one_parameter_again(family: str, tmp_path: Path):
    model, plain = MIXTURES[family](), MIXTURES[family]()
    way = model.get_experts_implementation()
    for name in ("poet", "coder"):
        put(model, Lora(rank=2), name=name, where=lambda name, layer: ".experts." in name)
    rankwise.remove_adapter(model, "poet")
    assert "eager" in str(model.get_experts_implementation())
    rankwise.remove_adapter(model, "coder")
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert model.get_experts_implementation() == way
    assert torch.equal(logits(model), logits(plain))
    rankwise.adapt(model, AdaLora(rank=2, target=1), where=lambda name, layer: ".experts." in name)
    rankwise.finish(model)  # of which nothing is left
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]


class Mixture(nn.Module):
    """Experts as layers of a list, each with the tokens that are sent to it."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x[..., 0] > 0
        y = torch.empty_like(x)
        for i, expert in enumerate(self.experts):
            chosen = first == bool(i)
            y[chosen] = expert(x[chosen])
        return y


def test_tokens_that_come_in_another_order_have_no_rows():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.blocks = nn.ModuleList([Mixture()])
    rankwise.adapt(model, Lora(rank=2), name="poet")
    x = torch.ones(1, 3, 8)
    rankwise.use(model, ["poet", None, None])
    with pytest.raises(ValueError, match="may be an expert"):
        model.blocks[0](x)


def test_low_rank_sums_are_one_lora_for_peft(tmp_path: Path):
    model, again = llama(), llama()
    put(model, Lora(rank=2, alpha=3.0), name="poet")
    put(model, Lora(rank=3), name="coder", where=attention)
    rankwise.use(model, {"poet": 0.7, "coder": -0.3})
    rankwise.save(model, tmp_path / "sum", format="peft")
    rankwise.load_adapter(again, tmp_path / "sum")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    ranks = {name: layer.matrix.parts[1].rank for name, layer in adapted(again).items()}
    assert set(ranks.values()) == {2, 5}
    assert all((rank == 5) == name.endswith("q_proj") for name, rank in ranks.items())
    rankwise.save(model, tmp_path / "poet", format="peft", name="poet")
    single = llama()
    rankwise.load_adapter(single, tmp_path / "poet")
    rankwise.use(model, "poet")
    torch.testing.assert_close(logits(single), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [Lora(rank=2, dropout=0.25), AdaLora(rank=2, target=2, dropout=0.25)])
@pytest.mark.parametrize("choice", [{"poet": 0.5}, {"poet": -0.5}, {"poet": 0.5, "coder": 0.25}])
def test_dropout_goes_with_a_weighted_one(method, choice, tmp_path: Path):
    model, again = llama(), llama()
    put(model, method, name="poet")
    put(model, Lora(rank=2, dropout=0.25), name="coder", where=attention)
    rankwise.use(model, choice)
    rankwise.save(model, tmp_path / "a", format="peft")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["lora_dropout"] == 0.25
    rankwise.load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)


def test_sums_of_no_low_rank_are_refused_by_peft(tmp_path: Path):
    model = put(llama(), Lora(rank=2, magnitudes=True), name="poet")
    rankwise.use(model, {"poet": 0.5})
    with pytest.raises(ValueError, match="low rank"):
        rankwise.save(model, tmp_path / "sum", format="peft")


def test_a_schedule_follows_what_is_in_use_alone():
    model = put(llama(), AdaLora(rank=2, target=1), name="first")
    rankwise.adapt(model, Lamda(rank=2), name="second")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    rankwise.finetune(model, list(ids().split(2)), held_out=0.3, steps=4, lr=1e-2)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    with rankwise.use(model, "first"):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        follower = rankwise.follow(model.train(), optimizer, steps=4)
        for _ in range(4):
            optimizer.zero_grad()
            model(ids()[:2], labels=ids()[:2]).loss.backward()
            optimizer.step()
        report = rankwise.check_adapters(model, optimizer, follower=follower)
        assert {row["acted"] for row in report.rows} == {4}
        follower.finish()
    assert list(rankwise.adapters_of(model)) == ["first", "second"]


def test_what_a_schedule_leaves_nothing_of_goes_alone():
    model = llama()
    put(model, Lora(rank=2), name="poet")
    rankwise.adapt(model, AdaLora(rank=2, target=1), name="empty")
    rankwise.finish(model)  # nothing was trained, so that nothing is left
    assert list(rankwise.adapters_of(model)) == ["poet"]
    assert torch.equal(logits(model), logits(llama()))
    rankwise.use(model, "poet")
    assert torch.equal(logits(model), logits(put(llama(), Lora(rank=2))))


@pytest.mark.parametrize("build", [llama, *MIXTURES.values()])
def test_what_a_schedule_leaves_nothing_of_is_the_model_again(build):
    model, plain = build(), build()
    rankwise.adapt(model, AdaLora(rank=2, target=1), name="empty")
    rankwise.finish(model)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert not structured(model)
    assert not rankwise.adapters_of(model)
    assert torch.equal(logits(model), logits(plain))
    rankwise.adapt(model, Lora(rank=2))  # one without a name


def test_two_schedules_of_one_layer_end_together():
    shared = llama()
    first, second = (shared.model.layers[i].self_attn for i in (0, 1))
    second.q_proj.weight = first.q_proj.weight
    for model in (llama(), shared):
        for name in ("empty", "other"):
            rankwise.adapt(model, AdaLora(rank=2, target=1), name=name, where=attention)
            if name == "other":
                moved(model)  # so that something is left
        rankwise.use(model, {"empty": 1.0, "other": 0.5})
        before = logits(model.eval())
        rankwise.finish(model)
        assert list(rankwise.adapters_of(model)) == ["other"]
        torch.testing.assert_close(logits(model), before)
        assert all(layer.matrix.choice == {"other": 0.5} for layer in structured(model).values())
    rankwise.remove_adapter(shared, "other")
    assert first.q_proj.weight is second.q_proj.weight


def test_what_is_followed_is_not_removed():
    model = llama()
    for name in ("poet", "scheduled"):
        rankwise.adapt(model, AdaLora(rank=2, target=1) if name == "scheduled" else Lora(rank=2), name=name)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    follower = rankwise.follow(model, optimizer, steps=1)
    for name in ("poet", "scheduled"):
        with pytest.raises(ValueError, match=r"followed still; call finish\(\)"):
            rankwise.remove_adapter(model, name)
    with pytest.warns(UserWarning, match="budget"):
        follower.finish()
    assert list(rankwise.adapters_of(model)) == ["poet"]
    rankwise.remove_adapter(model, "poet")


def test_each_trains_at_the_rate_that_it_suggests(tmp_path: Path):
    model, (batch, *_) = llama(), ids().split(8)
    methods = {"bat": Bat(block=8), "snella": adapters.Snella(rank=2), "lora": Lora(rank=2)}
    for name, method in methods.items():
        rankwise.adapt(model, method, name=name, where=attention)
    for name, method in methods.items():
        rankwise.use(model, name)
        wanted = GENERAL if method.lr is None else method.lr
        assert rankwise.finetune(model, [batch, batch], held_out=0.5, steps=1).totals["lr"] == [wanted]
        rankwise.save(model, tmp_path / name, format="rankwise", name=name)
        other = llama()
        rankwise.load_adapter(other, tmp_path / name)
        assert set(suggested_rates(other).values()) == {wanted}
    rankwise.use(model, {"bat": 0.5, "snella": 1.0})
    rates = rankwise.finetune(model, [batch, batch], held_out=0.5, steps=1).totals["lr"]
    assert sorted(rates) == sorted(methods[name].lr for name in ("bat", "snella"))
    rankwise.save(model, tmp_path / "sum", format="rankwise")
    rankwise.load_adapter(other := llama(), tmp_path / "sum")
    assert set(suggested_rates(other).values()) == {GENERAL}
    rankwise.remove_adapter(model, "lora")
    rankwise.remove_adapter(model, "snella")
    rankwise.use(model, "bat")
    assert set(suggested_rates(model).values()) == {methods["bat"].lr}


@pytest.mark.parametrize("idle", [False, True])
def test_a_schedule_that_is_not_in_use_changes_no_training(idle: bool):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
    plain = copy.deepcopy(net)
    if idle:
        rankwise.adapt(net, AdaLora(rank=4, target=2), name="idle")
    rankwise.adapt(net, Lora(rank=2), name="lora")
    data = [(x, (x[:, 0] > 0).long()) for x in torch.randn(12, 8, 16, generator=torch.Generator().manual_seed(0))]
    report = rankwise.finetune(net, data, steps=40, lr=3.0, every=2, patience=20)  # too fast: the last is worse
    assert report.rows[-1]["held_out"] > report.totals["held_out"]["after"]
    assert report.totals["best_step"] < 40
    rankwise.heal(net, plain, data=[x for x, _ in data], steps=2)


def test_rows_do_not_train_in_the_loop_of_the_project():
    model = both()
    rankwise.use(model, ["poet", "coder"])
    calls: list[object] = []
    for train in (
        lambda: rankwise.finetune(model, list(ids().split(2)), steps=2, notify=calls.append),
        lambda: rankwise.heal(model, llama(), data=list(ids().split(2)), steps=2),
    ):
        with pytest.raises(ValueError, match=r"each row has its own adapter; choose one for all"):
            train()
    assert not calls


def test_folding_takes_what_is_in_use():
    for choice in (None, "coder", {"poet": 0.5, "coder": 2.0}):
        model = both()
        rankwise.use(model, choice)
        before = logits(model)
        rankwise.fold(model)
        assert not any(isinstance(part, Several) for part in model.modules())
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: rankwise.use(m, "piper"), "no adapter 'piper'; it has 'poet', 'coder'"),
        (lambda m: rankwise.use(m, {"poet": 1.0, "piper": 1.0}), "no adapter 'piper'"),
        (lambda m: rankwise.use(m, ["poet", "piper"]), "no adapter 'piper'"),
        (lambda m: rankwise.use(m, {"poet": float("nan")}), "weights by name"),
        (lambda m: rankwise.use(m, {"poet": True}), "weights by name"),
        (lambda m: rankwise.use(m, []), "no row"),
        (lambda m: rankwise.use(m, [3]), "weights by name"),
        (lambda m: rankwise.use(m, 5), "weights by name, or None, or a sequence of these.*; got 5"),
        (lambda m: rankwise.use(m, True), "got True"),
        (lambda m: rankwise.remove_adapter(m, "piper"), "no adapter 'piper'"),
        (lambda m: rankwise.adapt(m, Lora(rank=2), name="poet"), "'poet' already"),
        (lambda m: rankwise.adapt(m, Lora(rank=2), name=""), "name must be"),
        (lambda m: rankwise.adapt(m, Lora(rank=2)), "'poet', 'coder'; give this one a name"),
        (lambda m: rankwise.adapt(m, Lora(rank=2), name="new", also=lambda n: "norm" in n), "leave 'also' out"),
        (lambda m: rankwise.adapt(m, adapters.Compacter(), name="new"), "switched off"),
        (lambda m: rankwise.adapt(m, adapters.Compacter()), "give this one a name"),
        (lambda m: rankwise.load_adapter(m, "nowhere", name="poet"), "'poet' already"),
        (lambda m: rankwise.load_adapter(m, "nowhere"), "give this one a name"),
        (lambda m: rankwise.save(m, "nowhere", format="peft", name="piper"), "no adapter 'piper'"),
        (lambda m: rankwise.save(m, "nowhere", name="poet"), "writes no adapter"),
        (lambda m: rankwise.save(m, "nowhere"), "has an adapter"),
        (lambda m: rankwise.use(m, None) and rankwise.save(m, "nowhere", format="peft"), "no adapter in use"),
        (lambda m: rankwise.use(m, None) and rankwise.save(m, "nowhere", format="rankwise"), "no adapter in use"),
        (lambda m: rankwise.use(m, None) and rankwise.check_adapters(m), "adapter in use"),
        (lambda m: rankwise.use(m, ["poet"]) and rankwise.save(m, "nowhere", format="rankwise"), "each row has"),
        (lambda m: rankwise.use(m, ["poet"]) and rankwise.fold(m), "each row has"),
        (lambda m: rankwise.use(m, ["poet"] * 3) and m(ids()[:4]), r"\(4, 20, 32\) reach .* for 3 rows"),
    ],
)
def test_errors_say_what_to_do_and_change_nothing(act, message: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = both()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        act(model)
    assert "\n" not in str(caught.value)
    rankwise.use(model, "coder")
    assert list(tmp_path.iterdir()) == []
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())


def test_names_are_for_adapters_that_have_one(tmp_path: Path):
    model = put(llama(), Lora(rank=2))
    for act in (rankwise.use, rankwise.remove_adapter):
        with pytest.raises(ValueError, match="name"):
            act(model, "poet")
    with pytest.raises(ValueError, match="has an adapter without a name"):
        rankwise.adapt(model, Lora(rank=2), name="poet")
    assert rankwise.adapters_of(model) == {}
    other = llama()
    rankwise.adapt(other, Lora(rank=2), also=lambda name: "norm" in name)
    rankwise.save(other, tmp_path / "norms", format="rankwise")
    again = both()
    with pytest.raises(ValueError, match="load it alone, without a name"):
        rankwise.load_adapter(again, tmp_path / "norms", name="norms")
    extended = llama()
    rankwise.adapt(extended, adapters.Compacter(count=2, reduction=4))
    with pytest.raises(ValueError, match="cannot be switched off"):
        rankwise.adapt(extended, Lora(rank=2), name="poet")


def test_a_state_holds_the_bases_once():
    model, again = both(), both()
    state = model.state_dict()
    places = [t.data_ptr() for t in state.values() if t.numel()]
    assert len(places) == len(set(places)) + 1  # the head is tied to the embeddings
    with torch.no_grad():
        for tensor in state.values():
            tensor.add_(0.01) if tensor.is_floating_point() else None
    again.load_state_dict(state)
    for choice in ("poet", {"poet": 0.5, "coder": 1.0}, ["poet", None, "coder", "poet"]):
        for each in (model, again):
            rankwise.use(each, choice)
        assert torch.equal(logits(again), logits(model))


@pytest.mark.slow
def test_a_trainer_trains_what_is_in_use_and_keeps_checkpoints(tmp_path: Path):
    from test_following import trainer_of

    model = both()
    rankwise.adapt(model, Lamda(rank=2), name="second")
    idle = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer_of(model, tmp_path, callbacks=[rankwise.trainer_callback()]).train()
    assert all(torch.equal(p, idle[n]) for n, p in model.named_parameters() if n in idle)
    again = both()
    rankwise.adapt(again, Lamda(rank=2), name="second")
    trainer_of(again, tmp_path, callbacks=[rankwise.trainer_callback()]).train(resume_from_checkpoint=True)
    rankwise.use(again, "poet")
    rankwise.use(model, "poet")
    assert torch.equal(logits(again), logits(model))
