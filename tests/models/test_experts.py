"""The experts of a mixture, kept in 3-D parameters, are layers like any other."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import MIXTURES, SIZES
from mixtures import mixture as mixture_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

import rankwise
from rankwise import CalibrationError
from rankwise.allocators import uniform
from rankwise.compressors import Gptq, KroneckerFactoredSvd, Lord, Mixed, PlainSvd, WhitenedSvd
from rankwise.core import labels
from rankwise.core.stacks import Stack, stacks, stacks_of
from rankwise.core.statistics import GradientWeightedInput, InputGram, InputMean, OutputGradGram, Statistics
from rankwise.core.statistics_file import load_statistics, save_statistics
from rankwise.core.surgery import Site, fold, replace, select, structured
from rankwise.matrices import Dense
from rankwise.models import predicted_bytes
from rankwise.models.folded import Folded

E, T, H, K = 3, 40, 6, 10  # experts, tokens for each, sizes of the small mixture below


def ids(rows: int = 6) -> Tensor:
    return torch.randint(3, 64, (rows, 20), generator=Generator().manual_seed(1))


def output(model: Any, x: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(ids() if x is None else x).logits


def experts_of(model: nn.Module) -> dict[str, Site]:
    return {name: site for name, site in select(model).items() if site.part is not None}


def only_experts(name: str, layer: nn.Module) -> bool:
    return ".experts." in name


@pytest.fixture(params=MIXTURES)
def mixture(request: pytest.FixtureRequest) -> Any:
    return MIXTURES[request.param]()


class Routed(nn.Module):
    """Sends the rows of each third of a batch to an expert of their own, gated by nothing."""

    def __init__(self, up: Tensor, down: Tensor, transposed: bool, batched: bool) -> None:
        super().__init__()
        self.is_transposed, self.right, self.batched = transposed, transposed, batched
        self.up, self.down = (nn.Parameter(w.mT.contiguous() if transposed else w) for w in (up, down))

    def product(self, x: Tensor, weights: Any) -> Tensor:
        if self.batched:
            return torch.bmm(x, weights)
        if self.right:
            return torch.stack([x[i] @ weights[torch.tensor(i)] for i in range(E)])
        return torch.stack([functional.linear(x[i], weights[i]) for i in range(E)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x.unflatten(0, (E, -1)), self.up)
        return self.product(y.tanh(), self.down).flatten(0, 1)


class Apart(nn.Module):
    """The same with an ``nn.Linear`` for each expert."""

    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.up, self.down = (nn.ModuleList(self.linear(w) for w in each) for each in (up, down))

    @staticmethod
    def linear(weight: Tensor) -> nn.Linear:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight.clone())
        return layer

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(0, (E, -1))
        return torch.cat([self.down[i](self.up[i](parts[i]).tanh()) for i in range(E)])


def weights() -> tuple[Tensor, Tensor]:
    generator = Generator().manual_seed(3)
    return torch.randn(E, K, H, generator=generator), torch.randn(E, H, K, generator=generator)


USES = {"linear(x, W[i])": (False, False), "x @ W[i]": (True, False), "bmm(x, W)": (True, True)}
NEEDS = (InputGram, OutputGradGram, InputMean, GradientWeightedInput)


def calibrated(model: nn.Module, x: Tensor, seed: int = 0) -> Statistics:
    return rankwise.calibrate(model, NEEDS, data=[x], labels=labels.gaussian, seed=seed)


@pytest.mark.parametrize("use", USES)
def test_statistics_equal_those_of_separate_layers(use):
    x = torch.randn(E * T, H, generator=Generator().manual_seed(4))
    found = calibrated(nn.Sequential(Routed(*weights(), *USES[use])), x)
    known = calibrated(nn.Sequential(Apart(*weights())), x)
    assert found.layers.keys() == known.layers.keys()
    share = (
        1 if use == "bmm(x, W)" else E
    )  # where each expert is handed all rows, what is zero is up to the router
    for name, stats in known.layers.items():
        for kind, statistic in stats.items():
            expected = statistic.value() / (share if kind.side != "input" else 1)
            torch.testing.assert_close(found.layers[name][kind].value(), expected, rtol=1e-4, atol=1e-7)


class Handed(nn.Module):
    """Hands every expert all rows, with zeros in place of those that are not meant for it, as Llama 4 does."""

    def __init__(self, experts: Routed) -> None:
        super().__init__()
        self.add_module("0", experts)

    def forward(self, x: Tensor) -> Tensor:
        meant = torch.arange(E).repeat_interleave(T) == torch.arange(E)[:, None]
        return self.get_submodule("0")((meant[:, :, None] * x).flatten(0, 1)).unflatten(0, (E, -1)).sum(0)


def test_rows_of_zeros_did_not_reach_an_expert():
    x = torch.randn(E * T, H, generator=Generator().manual_seed(4))
    known = calibrated(nn.Sequential(Routed(*weights(), *USES["x @ W[i]"])), x)
    found = calibrated(Handed(Routed(*weights(), *USES["bmm(x, W)"])), x)
    for name, stats in known.layers.items():
        for kind, statistic in stats.items():
            value = found.layers[name][kind].value()
            torch.testing.assert_close(value, statistic.value(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("use", [use for use in USES if use != "bmm(x, W)"])
def test_errors_of_experts_add_up_to_that_of_one_layer(use):
    """Equal experts that see equal rows are one layer, cut in three."""
    up, down = (w[:1].expand(E, -1, -1) for w in weights())
    rows = torch.randn(T, H, generator=Generator().manual_seed(4)).repeat(E, 1)
    found = calibrated(nn.Sequential(Routed(up, down, *USES[use])), rows)
    one = nn.Sequential(Apart.linear(up[0]), nn.Tanh(), Apart.linear(down[0]))
    known = calibrated(one, rows)
    method = KroneckerFactoredSvd(input_shrinkage=0, input_damping=0, output_damping=1e-9)
    for name, layer, weight in (("0.up", "0", up[0]), ("0.down", "2", down[0])):
        change = torch.randn(weight.shape, generator=Generator().manual_seed(5)).double()
        parts = [method.choices(weight, found.layers[f"{name}.{i}"]).error_of(change) for i in range(E)]
        assert sum(parts) == pytest.approx(method.choices(weight, known.layers[layer]).error_of(change), rel=1e-5)


def test_predicted_errors_are_the_change_of_the_loss_per_token():
    """Under unit Gaussian labels S = I, and the loss changes by half the squared change of the output."""
    up, down = weights()
    x = torch.randn(E * 4000, H, generator=Generator().manual_seed(4))
    model = nn.Sequential(Routed(up, down, False, False))
    found, before = calibrated(model, x), model(x)
    method = KroneckerFactoredSvd(input_shrinkage=0, input_damping=0, output_damping=0)
    site = select(model)["0.down.1"]
    choices = method.choices(site.weight, found.layers["0.down.1"])
    replace(model, site, choices.build(1))
    measured = (model(x) - before).square().sum() / 2 / len(x)
    assert float(choices.errors[1]) == pytest.approx(
        float(measured.detach()), rel=0.05
    )  # S is a mean over 4000 draws


def test_every_expert_is_a_site_that_maps_its_inputs_to_its_outputs(mixture):
    sites, hidden = experts_of(mixture), SIZES["hidden_size"]
    wanted = {
        f"{path}.{name}.{i}"
        for path, module in mixture.named_modules()
        for name, p in module.named_parameters(recurse=False)
        if p.dim() == 3
        for i in range(len(p))
    }
    assert sites.keys() == wanted
    for name, site in sites.items():
        m, n = site.weight.shape
        assert (n if "gate_up" in name else m) == hidden
    assert {row["name"] for row in rankwise.inspect(mixture).rows} >= wanted
    assert not any("router" in name or name.endswith("mlp.gate") for name in select(mixture))


def test_calibration_leaves_the_model_as_it_is(mixture):
    way, state = mixture.get_experts_implementation(), dict(mixture.state_dict(keep_vars=True))
    flags = {name: p.requires_grad for name, p in mixture.named_parameters()}
    expected = output(mixture)
    rankwise.calibrate(mixture, NEEDS, data=[ids()])
    after = mixture.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(after[name] is tensor for name, tensor in state.items())
    assert flags == {name: p.requires_grad for name, p in mixture.named_parameters()}
    assert mixture.get_experts_implementation() == way
    assert not any(module._forward_hooks for module in mixture.modules())
    assert torch.equal(output(mixture), expected)


def test_a_model_with_its_own_weights_as_matrices_computes_the_same(mixture):
    way = mixture.get_experts_implementation()
    expected, state = output(mixture), {name: t.clone() for name, t in mixture.state_dict().items()}
    for site in select(mixture).values():
        replace(mixture, site, Dense(site.weight.clone()))
    torch.testing.assert_close(output(mixture), expected, rtol=0, atol=1e-5)
    mixture.generate(ids(1), max_new_tokens=3, do_sample=False)
    fold(mixture)
    assert mixture.get_experts_implementation() == way
    assert mixture.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in mixture.state_dict().items())
    torch.testing.assert_close(output(mixture), expected, rtol=0, atol=1e-5)


def test_saved_loaded_folded_and_exported_it_is_the_same_model(mixture, tmp_path):
    dense = mixture.state_dict().keys()
    mixture.save_pretrained(tmp_path / "dense")
    report = rankwise.compress(mixture, KroneckerFactoredSvd(), keep=0.6, data=[ids()])
    assert report.totals["keep"]["params"] <= 0.6
    assert all(
        ".experts." not in row["name"] or row["params_after"] <= row["params_before"] for row in report.rows
    )
    expected = output(mixture)
    folder = rankwise.save(mixture, tmp_path / "small")
    assert predicted_bytes(mixture) == pytest.approx((folder / "model.safetensors").stat().st_size, abs=8)
    other, _ = rankwise.load(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(output(other), expected)
    assert torch.equal(output(plain), expected)
    again = rankwise.save(other, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    out = rankwise.export(folder, rankwise.exporters.Dense(), tmp_path / "out")
    torch.testing.assert_close(output(AutoModelForCausalLM.from_pretrained(out)), expected, rtol=0, atol=1e-5)
    assert names_in(out) == names_in(tmp_path / "dense")
    folded = rankwise.fold(other)
    assert folded.state_dict().keys() == dense
    torch.testing.assert_close(output(folded), expected, rtol=0, atol=1e-5)


def test_each_expert_is_written_out_once_and_weighs_what_it_is(tmp_path, monkeypatch):
    model = mixture_of("Mixtral", num_local_experts=6, intermediate_size=256)()
    rankwise.compress(model, PlainSvd(), keep=0.5, where=only_experts)
    folder, made = rankwise.save(model, tmp_path / "small"), []
    one = Folded.matrix
    monkeypatch.setattr(Folded, "matrix", lambda self, name: made.append(name) or one(self, name))
    out = rankwise.export(folder, rankwise.exporters.Dense(shard=1), tmp_path / "out")
    assert sorted(made) == sorted(structured(model))
    files = sorted(out.glob("*.safetensors"))
    size = sum(tensor.numel() * 4 for file in files for tensor in load_file(file).values())
    assert 1e6 < size < 2e6
    assert len(files) == 2
    assert json.loads((out / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == size


def names_in(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        return set(opened.keys())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt-oss", "mixtral"])
def test_without_rankwise_loading_fails(family, tmp_path):
    model = MIXTURES[family]()
    rankwise.compress(model, PlainSvd(), keep=0.5, where=only_experts)
    folder = rankwise.save(model, tmp_path / "small")
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "mismatch" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [PlainSvd(), WhitenedSvd(), Lord(), Gptq(), Mixed()], ids=lambda m: type(m).__name__
)
def test_any_method_compresses_experts(method, tmp_path):
    model = MIXTURES["gpt-oss"]()
    of = "bytes" if isinstance(method, Gptq) else "params"
    report = rankwise.compress(model, method, keep=0.6, of=of, data=[ids()], where=only_experts)
    assert report.totals["keep"][of] <= 0.6
    for row in report.rows:
        assert row["measured_error"] == pytest.approx(row["predicted_error"], rel=1e-3, abs=1e-12)
    other, _ = rankwise.load(rankwise.save(model, tmp_path / "small"))
    torch.testing.assert_close(output(other), output(model), rtol=0, atol=1e-6)


def test_where_is_asked_with_the_name_of_the_expert_and_the_module_that_owns_it():
    model, asked = MIXTURES["mixtral"](), {}

    def where(name: str, layer: nn.Module) -> bool:
        asked[name] = layer
        return name.endswith("experts.down_proj.1")

    report = rankwise.compress(model, PlainSvd(), keep=0.5, where=where)
    names = [f"model.layers.{i}.mlp.experts.down_proj.1" for i in range(2)]
    assert [row["name"] for row in report.rows] == names == list(structured(model))
    assert asked[names[0]] is model.model.layers[0].mlp.experts
    assert isinstance(model.model.layers[0].mlp.experts.gate_up_proj, nn.Parameter)


def never_reached(expert: int) -> Any:
    """A model whose routers never pick an expert."""
    model = MIXTURES["gpt-oss"]()
    for layer in model.model.layers:
        layer.mlp.router.bias.data[expert] = -1e4
    return model


@pytest.mark.parametrize(
    "options", [{}, {"allocate": uniform}, {"method": WhitenedSvd()}], ids=["default", "uniform", "whitened"]
)
def test_experts_that_no_token_reached_stay_and_are_named(options, tmp_path):
    model = never_reached(2)
    before = {name: site.weight.clone() for name, site in experts_of(model).items()}
    options = {"method": KroneckerFactoredSvd(), **options}
    report = rankwise.compress(model, keep=0.6, data=[ids()], **options)
    named = [name for name in before if name.endswith(".2")]
    assert report.totals["unreached"] == named
    assert f"{len(named)} that no data reached" in report.title
    assert report.totals["keep"]["params"] <= 0.6
    assert {row["kind"] for row in report.rows if row["name"] in named} == {"Dense"}
    kept = {name: site.weight for name, site in select(model).items() if name in named}
    assert all(torch.equal(kept[name], before[name]) for name in named)
    other, _ = rankwise.load(rankwise.save(model, tmp_path / "small"))
    assert torch.equal(output(other), output(model))


def test_statistics_of_unreached_experts_are_kept_on_disk(tmp_path):
    model, path = never_reached(2), tmp_path / "statistics.safetensors"
    found = rankwise.calibrate(model, KroneckerFactoredSvd.needs, data=[ids()])
    save_statistics(found, path, model)
    again = load_statistics(path, model)
    assert [name for name in again.layers if again.unreached(name)] == [
        name for name in experts_of(model) if name.endswith(".2")
    ]
    with pytest.raises(CalibrationError, match="never reached"):
        again.of("model.layers.0.mlp.experts.down_proj.2", (InputGram,))


def test_experts_none_of_which_is_reached_are_an_error():
    model = never_reached(2)
    with pytest.raises(CalibrationError, match=r"no matrix was reached by the data: .*experts\.down_proj"):
        rankwise.compress(
            model,
            KroneckerFactoredSvd(),
            keep=0.6,
            data=[ids()],
            where=lambda name, _: name.endswith(("gate_up_proj.1", "down_proj.2")),
        )


def test_an_expert_with_one_row_is_compressed_by_what_it_saw():
    model = MIXTURES["gpt-oss"]()
    statistics = rankwise.calibrate(model, KroneckerFactoredSvd.needs, data=[ids(1)[:, :3]])
    counts = {s[InputGram].count for name, s in statistics.layers.items() if name in experts_of(model) and s}
    assert min(counts) == 1
    report = rankwise.compress(model, KroneckerFactoredSvd(), keep=0.7, data=statistics)
    for row in report.rows:
        assert row["measured_error"] == pytest.approx(row["predicted_error"], rel=1e-3, abs=1e-12)


def test_a_damaged_expert_is_named():
    model = MIXTURES["qwen2 moe"]()
    model.model.layers[1].mlp.experts.gate_up_proj.data[2, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.gate_up_proj\.2: its weight holds NaN"):
        rankwise.compress(model, PlainSvd(), keep=0.5)


@pytest.mark.parametrize("family", ["mixtral", "llama4"])
def test_padding_is_not_a_token_that_experts_share(family):
    """Gradients are means over the tokens that count, so padding does not make an expert cheaper."""
    model, x = MIXTURES[family](), ids()
    wide = functional.pad(x, (0, 10), value=2)
    mask = functional.pad(torch.ones_like(x), (0, 10))
    plain, padded = (
        rankwise.calibrate(model, (OutputGradGram,), data=[batch], labels=labels.given)
        for batch in ({"input_ids": x}, {"input_ids": wide, "attention_mask": mask})
    )
    for name, stats in plain.layers.items():
        ours, other = (each[OutputGradGram].value() for each in (padded.layers[name], stats))
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))


def test_other_ways_to_compute_experts_are_refused():
    model = MIXTURES["mixtral"]()
    rankwise.compress(model, PlainSvd(), keep=0.5, where=only_experts)
    for way in ("grouped_mm", "batched_mm"):
        model.set_experts_implementation(way)
        with pytest.raises(ValueError, match="Compute experts one by one"):
            output(model)
    model.set_experts_implementation("eager")
    assert bool(output(model).isfinite().all())


def test_what_is_no_stack():
    alone = Apart(*weights())
    alone.table = nn.Parameter(torch.zeros(2, 8, 4))  # of positions
    assert not stacks_of(alone)
    assert not stacks_of(nn.Conv1d(4, 4, 3))
    assert not stacks_of(nn.Bilinear(4, 4, 4))
    gates = nn.Module()  # as RecurrentGemma's: each block of a row is multiplied from the other side
    gates.input_gate, gates.recurrent_gate = (nn.Parameter(torch.zeros(3, 4, 4)) for _ in range(2))
    assert not stacks_of(gates)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_order_of_a_stack_is_seen_by_its_shapes(transposed):
    class Own(nn.Module):
        pass

    owner = Own()
    for name, (m, n) in {"up": (10, 4), "down": (4, 5)}.items():  # behind a gate
        setattr(owner, name, nn.Parameter(torch.zeros(3, n, m) if transposed else torch.zeros(3, m, n)))
    assert stacks_of(owner) == {"up": transposed, "down": transposed}
    owner.up = Stack(owner._parameters.pop("up"), transposed)
    assert stacks_of(owner) == {"down": transposed}


def test_matrices_used_against_what_their_shapes_say_are_an_error():
    model = nn.Sequential(Routed(*weights(), transposed=True, batched=False))
    model[0].is_transposed = None
    x = torch.randn(E * T, H)
    with pytest.raises(ValueError, match="is_transposed = True"):
        calibrated(model, x)
    assert isinstance(model[0].up, nn.Parameter)  # as before
    model[0].is_transposed = True
    model[0].right = False
    with pytest.raises(ValueError, match="used by linear"):
        calibrated(model, x)


def test_all_experts_count():
    model = MIXTURES["qwen3 moe"]()
    before = rankwise.evaluate(model, None, {"text": ids()[0]}, window=20).totals
    report = rankwise.compress(model, KroneckerFactoredSvd(), keep=0.6, data=[ids()])
    after = rankwise.evaluate(model, None, {"text": ids()[0]}, window=20).totals
    for unit, total in (("macs", "macs_per_token"), ("params", "params")):
        dense = sum(row["params_before"] for row in report.rows)
        saved = round(dense * (1 - report.totals["keep"][unit]))
        assert before[total] - after[total] == saved


def test_experts_heal():
    model, reference = MIXTURES["gpt-oss"](), MIXTURES["gpt-oss"]()
    batches = list(ids(24).split(2))
    found = rankwise.calibrate(reference, KroneckerFactoredSvd.needs, data=batches)
    rankwise.compress(model, KroneckerFactoredSvd(), keep=0.4, data=found)
    report = rankwise.heal(model, reference, budget=60, steps=6, every=2, data=batches, rows=80)
    assert report.totals["improved"]


EXPERTS = "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (
            lambda group: group.update(names=[f"{EXPERTS}.down_proj.7"]),
            r"down_proj\.7 is in the config",
        ),
        (lambda group: group.update(names=[f"{EXPERTS}.other.0"]), r"other\.0 is in the config"),
        (lambda group: group["spec"].update(shape=[4, 4]), "its spec in the config"),
    ],
)
def test_a_damaged_config_is_named(edit, named, tmp_path):
    model = MIXTURES["mixtral"]()
    for site in experts_of(model).values():
        replace(model, site, Dense(site.weight.clone()))
    folder = rankwise.save(model, tmp_path / "small")
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"]["matrices"][0])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=named):
        rankwise.load(folder)


def test_a_missing_expert_is_named(tmp_path):
    model = MIXTURES["mixtral"]()
    rankwise.compress(model, PlainSvd(), keep=0.9, where=lambda name, _: name.endswith("down_proj.0"))
    folder = rankwise.save(model, tmp_path / "small")
    gone = "model.layers.1.mlp.experts.down_proj.2.weight"
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys() if name != gone}  # noqa: SIM118 (no mapping)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"experts\.down_proj\.2\.weight is not in the checkpoint"):
        rankwise.load(folder)


def test_a_folded_expert_with_a_new_bias_stays_a_layer(tmp_path):
    model = MIXTURES["gpt-oss"]()
    rankwise.compress(model, Lord(), keep=0.6, data=[ids()], where=only_experts)
    expected = output(model)
    rankwise.fold(model)
    assert any(True for _ in stacks(model))
    torch.testing.assert_close(output(model), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="got a bias from compression"):
        rankwise.save(model, tmp_path / "out")


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_saving_without_rankwise_keeps_what_was_loaded(family, tmp_path):
    model = MIXTURES[family]()
    rankwise.compress(model, PlainSvd(), keep=0.5, where=only_experts)
    loaded = AutoModelForCausalLM.from_pretrained(rankwise.save(model, tmp_path / "small"))
    loaded.save_pretrained(tmp_path / "again")
    again, _ = rankwise.load(tmp_path / "again")
    assert torch.equal(output(again), output(model))
    with safe_open(tmp_path / "again" / "model.safetensors", framework="pt") as opened:
        kept = [name for name in names_in(tmp_path / "again") if name.endswith("experts.down_proj")]
        assert {opened.get_tensor(name).shape for name in kept} == {(0,)}


def test_the_state_of_compressed_experts_fits_them_alone():
    model, other, dense = (MIXTURES["mixtral"]() for _ in range(3))
    for each in (model, other):
        rankwise.compress(each, PlainSvd(), keep=0.5, where=only_experts)
    for parameter in other.parameters():
        nn.init.zeros_(parameter.data)
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other), output(model))
    with pytest.raises(RuntimeError, match=r"size mismatch for .*experts\.down_proj"):
        dense.load_state_dict(model.state_dict())


def test_biases_that_an_ordinary_folder_cannot_hold_are_refused(tmp_path):
    model = MIXTURES["gpt-oss"]()
    rankwise.compress(model, Lord(), keep=0.6, data=[ids()], where=only_experts)
    with pytest.raises(ValueError, match="got a bias from compression"):
        rankwise.export(model, rankwise.exporters.Dense(), tmp_path / "out")
