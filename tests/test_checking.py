"""What does not train is named; what does is not."""

import pytest
import torch
from contracts.examples import draw
from tiny import ids, llama
from torch import nn
from torch.nn import functional

import rankwise
from rankwise import checking
from rankwise.adapters import AdaLora, Compacter, Householder, Lora
from rankwise.core.extended import extended
from rankwise.core.methods import Adapter
from rankwise.initialisers import SingularVectors


def adapted_net(method: object, **options) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 8))
    rankwise.adapt(model, method, **options)
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, scale: float = 1.0) -> None:
    optimizer.zero_grad()
    (scale * model(draw(16, 10).float())).square().mean().backward()
    optimizer.step()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("method", [Lora(rank=2), Lora(rank=2, magnitudes=True), Lora(start=SingularVectors())])
def test_one_step_is_enough_to_be_without_a_problem(method: Lora):
    """Though the gradient of A was zero at the first step."""
    model = adapted_net(method)
    optimizer = torch.optim.SGD(trained(model), lr=1e-4)
    follower = rankwise.follow(model, optimizer, steps=2)
    step(model, optimizer)
    report = rankwise.check_adapters(model, optimizer, follower=follower)
    assert report.totals["problems"] == {}
    assert report.title == "2 adapted layers train"
    for row, layer in zip(report.rows, rankwise.core.adapted.adapted(model).values(), strict=True):
        gradients = [p.grad.norm() for p in layer.matrix.parameters() if p.grad is not None]
        assert row["gradient"] == pytest.approx(float(torch.stack(gradients).norm()), rel=1e-5)
        before = layer.matrix.members[0].dense() if not method.magnitudes else layer.matrix.base.dense()
        change = (layer.matrix.dense() - before).norm() / before.norm()
        assert row["change"] == pytest.approx(float(change.detach()), rel=1e-2, abs=1e-7)
        assert row["change"] > 0


@pytest.mark.parametrize("method", [Lora(rank=2), Lora(rank=2, start=SingularVectors())])
def test_what_never_moved_is_named(method: Lora):
    model = adapted_net(method)
    rows = rankwise.check_adapters(model).rows
    assert [row["problem"] for row in rows] == ["no gradient and no change"] * 2
    optimizer = torch.optim.SGD(trained(model), lr=0.0)
    step(model, optimizer)
    report = rankwise.check_adapters(model, optimizer)
    assert report.totals["problems"] == {"0": "a gradient, but no change", "2": "a gradient, but no change"}
    assert report.title.startswith("2 of 2 adapted layers have a problem: 0: a gradient")


def test_a_gradient_that_a_far_too_large_rate_made_zero_names_the_rate():
    """Factors so large that all outputs of the layer saturate."""
    model = adapted_net(Lora(rank=2))
    optimizer = torch.optim.SGD(trained(model), lr=1e15)
    follower = rankwise.follow(model, optimizer, steps=3)
    for _ in range(2):
        step(model, optimizer)
    problem = rankwise.check_adapters(model, optimizer, follower=follower).totals["problems"]["0"]
    assert problem.startswith("the gradient was always zero: matrix.members.1.matrix.right (the weight grew")
    assert problem.endswith("times: lower the learning rate)")


def test_an_always_zero_gradient_is_named():
    """A layer whose outputs nobody reads, and a factor behind one that stays zero."""
    model = adapted_net(Lora(rank=2))
    left = model[0].matrix.members[1].matrix.left
    optimizer = torch.optim.SGD([p for p in trained(model) if p is not left], lr=0.1)
    follower = rankwise.follow(model, optimizer, steps=3)
    for _ in range(2):
        step(model, optimizer)
    problems = rankwise.check_adapters(model, follower=follower).totals["problems"]
    assert problems == {"0": "the gradient was always zero: matrix.members.1.matrix.right"}
    torch.manual_seed(0)
    unread = nn.ModuleDict({"read": nn.Linear(10, 12), "unread": nn.Linear(10, 12)})
    rankwise.adapt(unread, Lora(rank=2))
    optimizer = torch.optim.SGD(trained(unread), lr=0.1)
    for _ in range(2):
        step(unread["read"], optimizer)
    problems = rankwise.check_adapters(unread, optimizer).totals["problems"]
    assert problems == {"unread": "no gradient and no change"}


def test_what_is_in_no_optimiser_is_named():
    model = adapted_net(Lora(rank=2), also=lambda name: name == "2.bias")
    known = [*model[0].parameters(), model[2].matrix.members[1].matrix.left]
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in known if p.requires_grad]
    for optimizer in optimizers:
        step(model, optimizer)
    report = rankwise.check_adapters(model, optimizers)
    assert report.totals["problems"] == {
        "2": "in no optimiser: matrix.members.1.matrix.right",
        "2.bias": "in no optimiser",
    }
    assert report.title.endswith("and 1 more")


def test_a_schedule_that_did_not_act_is_named():
    model = adapted_net(AdaLora(rank=2, target=1)).eval()  # where the model itself does not refuse
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    step(model, optimizer)
    report = rankwise.check_adapters(model, optimizer)
    assert all("never acted" in problem for problem in report.totals["problems"].values())
    rankwise.follow(model, optimizer, steps=2)
    step(model, optimizer)
    report = rankwise.check_adapters(model, optimizer)
    assert report.totals["problems"] == {}
    assert [row["acted"] for row in report.rows] == [1, 1]


def test_modules_behind_layers_are_looked_at():
    model = llama()
    rankwise.adapt(model, Compacter(reduction=4))
    left_out = {id(p) for p in model.model.layers[1].mlp.down_proj.after.parameters() if p.dim() != 3}
    optimizer = torch.optim.SGD([p for p in trained(model) if id(p) not in left_out], lr=0.1)
    follower = rankwise.follow(model, optimizer, steps=2)
    names = [f"model.layers.{i}.{last}" for i in range(2) for last in ("self_attn.o_proj", "mlp.down_proj")]
    rows = rankwise.check_adapters(model).rows
    assert [(row["name"], row["change"], row["problem"]) for row in rows] == [
        (name, 0.0, "no gradient and no change") for name in names
    ]
    for _ in range(2):
        optimizer.zero_grad()
        model(ids(), labels=ids()).loss.backward()
        optimizer.step()
    report = rankwise.check_adapters(model, optimizer, follower=follower)
    assert list(report.totals["problems"]) == names[-1:]
    assert report.totals["problems"][names[-1]] == ("in no optimiser: after.inner_bias, after.outer_bias")
    assert [row["trained"] for row in report.rows] == [
        sum(p.numel() for p in layer.after.parameters()) for layer in extended(model).values()
    ]
    after = model.model.layers[0].mlp.down_proj.after.double()
    h = torch.randn(64, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = after.up(functional.gelu(after.down(h) + after.inner_bias, approximate="tanh")) + after.outer_bias
    assert report.rows[1]["change"] == pytest.approx(float((moved.norm() / h.norm()).detach()), rel=1e-6)


@pytest.mark.parametrize("method", [Lora(rank=2), Lora(rank=2, magnitudes=True), Householder(rank=2)])
def test_a_change_is_measured_some_rows_at_a_time(method: Adapter, monkeypatch: pytest.MonkeyPatch):
    model = adapted_net(method)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    step(model, optimizer)
    whole = [row["change"] for row in rankwise.check_adapters(model).rows]
    monkeypatch.setattr(checking, "AT_ONCE", 25)
    assert [row["change"] for row in rankwise.check_adapters(model).rows] == pytest.approx(whole, rel=1e-9)


def test_without_adapters_there_is_nothing_to_check():
    with pytest.raises(ValueError, match="no layer of the model has an adapter"):
        rankwise.check_adapters(nn.Sequential(nn.Linear(3, 3)))


def test_numbers_that_are_not_finite_are_named():
    model = adapted_net(Lora(rank=2))
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    step(model, optimizer, scale=float("nan"))
    report = rankwise.check_adapters(model, optimizer)
    assert all("not finite" in problem for problem in report.totals["problems"].values())
    assert '"change": null' in report.to_json()
