"""Adapters written into weights, as differences and as LoRA: right, refused where wrong, a tensor at a time."""

import copy
import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from contracts.examples import draw
from safetensors.torch import load_file, save_file
from tiny import gpt2, ids, llama
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

import rankwise
from rankwise.adapters import Compacter, FactorLora, Householder
from rankwise.adapters import Lora as LoraAdapter
from rankwise.cli import app
from rankwise.compressors import Gptq, PlainSvd
from rankwise.core.surgery import base_of, replace, select
from rankwise.exporters import Absorbed, Delta, Lora, Merged, merged
from rankwise.matrices import Base, Branch, Dense, Diagonal, LowRank, Product, StructuredMatrix, Sum
from rankwise.models import adapted_weights
from rankwise.models.adapted_weights import AdaptedWeights


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * draw(*parameter.shape, seed=i).to(parameter))
    return model


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return build().eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids()).logits


def diagonal(model: nn.Module) -> None:
    """Adapters whose changes have full rank."""
    model.requires_grad_(False)
    for i, site in enumerate(select(model).values()):
        base = Base(Dense(site.weight))
        replace(model, site, Product(Diagonal(1 + 0.1 * draw(base.shape[0], seed=i).float()), base))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object]]] = {
    "lora": (llama, lambda model: rankwise.adapt(model, LoraAdapter(rank=2), also=lambda name: "norm" in name)),
    "dora": (llama, lambda model: rankwise.adapt(model, LoraAdapter(rank=2, magnitudes=True))),
    "embeddings": (
        llama,
        lambda model: rankwise.adapt(model, LoraAdapter(rank=2), also=lambda name: "embed" in name),
    ),
    "tables": (
        lambda: llama(tie_word_embeddings=False, pad_token_id=5),
        lambda model: rankwise.adapt(
            model, LoraAdapter(rank=2), where=lambda name, _: "embed" in name or "q_proj" in name, embeddings=True
        ),
    ),
    "transposed": (
        gpt2,
        lambda model: rankwise.adapt(model, LoraAdapter(rank=2), also=lambda n: "c_attn.bias" in n),
    ),
    "transposed dora": (gpt2, lambda model: rankwise.adapt(model, LoraAdapter(rank=2, magnitudes=True))),
    "full rank": (llama, diagonal),
    "full rank transposed": (gpt2, diagonal),
}
LOW_RANK = [name for name in CASES if "full rank" not in name]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, nn.Module]:
    """The folder of a base, and the adapted model."""
    build, attach = CASES[request.param]
    model = seeded(build)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    attach(model)
    return tmp_path, moved(model)


def written(folder: Path, model: nn.Module, format: str = "rankwise") -> Path:
    return rankwise.save(model, folder / format, format=format)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
@pytest.mark.parametrize("block", [2**18, 100])
def test_merged_weights_compute_the_same(
    case: tuple[Path, nn.Module], block: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(adapted_weights, "BLOCK", block)
    folder, model = case
    adapter, base = written(folder, model), str(folder / "base")
    whole, small = folder / "whole", folder / "small"
    rankwise.export(adapter, Merged(base=base), whole)
    rankwise.export(adapter, Merged(base=base, memory="40KB", shard=1), small)
    torch.testing.assert_close(logits(rankwise.load(whole)[0]), logits(model))
    torch.testing.assert_close(logits(rankwise.load(small)[0]), logits(model))
    names = {name for file in (folder / "base").glob("*.safetensors") for name in load_file(file)}
    assert load_file(whole / "model.safetensors").keys() == names
    direct = rankwise.export(model, Merged(base=base), folder / "direct")
    one, other = load_file(whole / "model.safetensors"), load_file(direct / "model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_merged_weights_are_those_of_fold(case: tuple[Path, nn.Module]):
    folder, model = case
    out = rankwise.export(written(folder, model), Merged(base=str(folder / "base")), folder / "out")
    state = rankwise.fold(model).state_dict()
    for name, tensor in load_file(out / "model.safetensors").items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-6, atol=1e-6)


def test_differences_add_up_to_the_adapted_model(case: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(adapted_weights, "BLOCK", 100)
    folder, model = case
    out = rankwise.export(written(folder, model), Delta(base=str(folder / "base")), folder / "out")
    plain = rankwise.load(folder / "base")[0]
    with torch.no_grad():
        for name, change in load_file(out / "delta.safetensors").items():
            assert change.dtype == torch.float32
            assert bool(change.any())
            plain.get_parameter(name).add_(change)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "tolerance"), [(LoraAdapter(rank=2), 1e-6), (Householder(rank=2), 1e-3)], ids=["beside", "around"]
)
@pytest.mark.parametrize("compressor", [PlainSvd(), Gptq(bits=4, group=16)], ids=lambda each: type(each).__name__)
def test_a_difference_is_the_adapters_whatever_is_under_it(method, tolerance, compressor, tmp_path: Path):
    model = seeded(llama).bfloat16()
    rankwise.compress(model, compressor, keep=0.9, of="bytes", data=[ids()])
    rankwise.save(model, tmp_path / "base")
    rankwise.adapt(model, method)
    moved(model)
    adapter = written(tmp_path, model)
    out = rankwise.export(adapter, Delta(base=str(tmp_path / "base")), tmp_path / "out")
    found = load_file(out / "delta.safetensors")
    for name, layer in rankwise.core.adapted.adapted(model).items():
        wide = copy.deepcopy(layer.matrix).double().requires_grad_(False)
        change = wide.dense() - base_of(wide).dense()
        assert float((found[f"{name}.weight"] - change).norm()) < tolerance * float(change.norm())


@pytest.mark.parametrize("case", LOW_RANK, indirect=True)
def test_a_lora_computes_the_same(case: tuple[Path, nn.Module]):
    folder, model = case
    out = rankwise.export(written(folder, model), Lora(base=str(folder / "base")), folder / "out")
    assert set(json.loads((out / "rankwise_errors.json").read_text()).values()) == {0.0}
    plain = rankwise.load(folder / "base")[0]
    rankwise.load_adapter(plain, out)
    torch.testing.assert_close(logits(plain), logits(model))


def test_what_peft_writes_is_merged_too(tmp_path: Path):
    model = seeded(llama)
    model.save_pretrained(tmp_path / "base")
    rankwise.adapt(model, LoraAdapter(rank=2), also=lambda name: "embed" in name)
    adapter = written(tmp_path, moved(model), "peft")
    out = rankwise.export(adapter, Merged(base=str(tmp_path / "base")), tmp_path / "out")
    torch.testing.assert_close(logits(rankwise.load(out)[0]), logits(model))


def test_a_change_of_full_rank_is_cut_to_a_rank_and_the_error_is_told(tmp_path: Path):
    model = seeded(llama)
    model.save_pretrained(tmp_path / "base")
    diagonal(model)
    adapter, base = written(tmp_path, moved(model)), str(tmp_path / "base")
    with pytest.raises(ValueError, match="of no low rank: give a rank"):
        rankwise.export(adapter, Lora(base=base), tmp_path / "out")
    out = rankwise.export(adapter, Lora(base=base, rank=5), tmp_path / "out")
    name = "model.layers.0.mlp.up_proj"
    site = select(model, lambda path, layer: path == name, compressed=True)[name]
    matrix: StructuredMatrix = site.layer.matrix
    values = torch.linalg.svdvals(
        (matrix.dense().detach() - rankwise.load(base)[0].get_parameter(f"{name}.weight").detach()).double()
    )
    expected = float((values[5:].square().sum() / values.square().sum()).sqrt())
    found = json.loads((out / "rankwise_errors.json").read_text())[name]
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", [LoraAdapter(rank=2), FactorLora(rank=2)])
def test_a_compressed_base_is_written_out(method: LoraAdapter | FactorLora, tmp_path: Path):
    model = seeded(llama)
    rankwise.compress(model, PlainSvd(), keep=0.7)
    rankwise.save(model, tmp_path / "base")
    rankwise.adapt(model, method)
    adapter = written(tmp_path, moved(model))
    out = rankwise.export(adapter, Merged(base=str(tmp_path / "base")), tmp_path / "out")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    torch.testing.assert_close(logits(rankwise.load(out)[0]), logits(model))


@pytest.mark.parametrize("method", [LoraAdapter(rank=2), FactorLora(rank=2)])
def test_a_compressed_base_takes_an_adapter_in(method: LoraAdapter | FactorLora, tmp_path: Path):
    model = seeded(llama)
    rankwise.compress(model, PlainSvd(), keep=0.7)
    rankwise.save(model, tmp_path / "base")
    rankwise.adapt(model, method)
    adapter, base = written(tmp_path, moved(model)), str(tmp_path / "base")
    out = rankwise.export(adapter, Absorbed(base=base), tmp_path / "out")
    one, other = (load_file(folder / "model.safetensors") for folder in (Path(base), out))
    assert {name: tensor.shape for name, tensor in one.items()} == {name: x.shape for name, x in other.items()}
    report = rankwise.absorb(model)
    assert json.loads((out / "rankwise_absorbed.json").read_text()) == report.rows
    torch.testing.assert_close(logits(rankwise.load(out)[0]), logits(model))


def test_numbers_too_large_for_the_files_are_named(tmp_path: Path):
    model = seeded(llama).half()
    model.save_pretrained(tmp_path / "base")
    rankwise.adapt(model, LoraAdapter(rank=2), where=lambda name, _: "1.self_attn.k_proj" in name)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.fill_(300.0)
    with pytest.raises(ValueError, match=r"1\.self_attn\.k_proj\.weight holds NaN or infinity as torch\.float16"):
        rankwise.export(model, Merged(base=str(tmp_path / "base"), compare=0), tmp_path / "out")


def test_files_that_are_not_of_the_model_stay_out(tmp_path: Path):
    model = seeded(llama)
    model.save_pretrained(tmp_path / "base")
    names = load_file(tmp_path / "base" / "model.safetensors").keys()
    save_file({"layers.0.attention.wq.weight": draw(2, 2)}, tmp_path / "base" / "consolidated.safetensors")
    (tmp_path / "base" / "consolidated.safetensors.index.json").write_text("{}")
    rankwise.adapt(model, LoraAdapter(rank=2))
    out = rankwise.export(moved(model), Merged(base=str(tmp_path / "base")), tmp_path / "out")
    assert load_file(out / "model.safetensors").keys() == names
    assert not list(out.glob("*.index.json"))


def test_half_precision_is_rounded_once(tmp_path: Path):
    model = seeded(llama).bfloat16()
    model.save_pretrained(tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rankwise.adapt(model, LoraAdapter(rank=2))
    adapter = written(tmp_path, moved(model))
    out = rankwise.export(adapter, Merged(base=str(tmp_path / "base")), tmp_path / "out")
    merged = load_file(out / "model.safetensors")
    for name, layer in rankwise.core.adapted.adapted(model).items():
        low: LowRank = layer.matrix.members[1].matrix
        wide = before[f"{name}.weight"].double() + low.left.detach().double() @ low.right.detach().double()
        ties = (
            (merged[f"{name}.weight"] != wide.bfloat16()).float().mean()
        )  # float32 sums may fall on the other side
        assert ties < 0.01


@pytest.mark.parametrize("to", [Absorbed, Merged])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors | {"extra": torch.zeros(1)}, "nothing.* reads: extra"),
        (lambda tensors: dict(list(tensors.items())[1:]), "lacks .*model.layers"),
    ],
)
def test_a_damaged_adapter_is_refused(change, message: str, to, tmp_path: Path):
    model = seeded(llama)
    model.save_pretrained(tmp_path / "base")
    rankwise.adapt(model, LoraAdapter(rank=2))
    file = written(tmp_path, model) / "rankwise_adapter.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(ValueError, match=message):
        rankwise.export(file.parent, to(base=str(tmp_path / "base")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("exporter", [Merged, Delta, Lora])
def test_another_base_of_files_of_peft_is_refused(exporter: Callable[..., Lora], tmp_path: Path):
    model = seeded(llama)
    model.save_pretrained(tmp_path / "base")
    llama(initializer_range=0.3).save_pretrained(tmp_path / "other")
    rankwise.adapt(model, LoraAdapter(rank=2))
    adapter = written(tmp_path, moved(model), "peft")
    again = rankwise.export(adapter, Lora(base=str(tmp_path / "base")), tmp_path / "again")
    for folder in (adapter, again):
        with pytest.raises(ValueError, match=r"was made for other values of model\.layers"):
            rankwise.export(folder, exporter(base=str(tmp_path / "other")), tmp_path / "out")
    rankwise.export(again, exporter(base=str(tmp_path / "base")), tmp_path / "out")


def test_a_lora_names_its_task_and_base(tmp_path: Path):
    model = seeded(llama)
    model.save_pretrained(tmp_path / "base")
    rankwise.adapt(model, LoraAdapter(rank=2))
    out = rankwise.export(model, Lora(base=str(tmp_path / "base")), tmp_path / "out")
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", str(tmp_path / "base"))


def test_another_base_is_refused(tmp_path: Path):
    model = seeded(llama)
    rankwise.adapt(model, LoraAdapter(rank=2))
    adapter = written(tmp_path, model)
    torch.manual_seed(4)
    llama(initializer_range=0.3).save_pretrained(tmp_path / "other")
    llama(num_hidden_layers=1).save_pretrained(tmp_path / "short")
    small = seeded(llama)
    rankwise.compress(small, PlainSvd(), keep=0.7)
    rankwise.save(small, tmp_path / "small")
    for name, message in (("other", "other values of .*model.layers"), ("short", "does not have")):
        with pytest.raises(ValueError, match=message):
            rankwise.export(adapter, Merged(base=str(tmp_path / name)), tmp_path / "out")
    for name, message in (
        ("other", "other values"),
        ("short", "nothing in this model reads"),
        ("small", "other values"),
    ):
        with pytest.raises(ValueError, match=message):
            rankwise.export(adapter, Absorbed(base=str(tmp_path / name)), tmp_path / "out")


@pytest.mark.parametrize("memory", ["", "2", "2 apples", "-1GiB", "0MB"])
def test_too_little_memory_is_refused(memory: str, tmp_path: Path):
    model = seeded(llama)
    model.save_pretrained(tmp_path / "base")
    rankwise.adapt(model, LoraAdapter(rank=2))
    with pytest.raises(ValueError, match=r"memory must be a size|takes \d+ bytes of memory at least"):
        rankwise.export(
            written(tmp_path, model), Merged(base=str(tmp_path / "base"), memory=memory), tmp_path / "o"
        )


def test_too_little_memory_for_what_has_no_adapter_is_refused(tmp_path: Path):
    model = seeded(lambda: llama(vocab_size=3000))
    model.save_pretrained(tmp_path / "base")
    rankwise.adapt(model, LoraAdapter(rank=2), where=lambda name, _: name.endswith("k_proj"))
    adapter, base = written(tmp_path, model), str(tmp_path / "base")
    with pytest.raises(ValueError, match=r"embed_tokens.weight takes \d+ bytes of memory at least"):
        rankwise.export(adapter, Merged(base=base, memory="100KB"), tmp_path / "out")
    rankwise.export(adapter, Merged(base=base, memory="400KB"), tmp_path / "out")


@pytest.mark.parametrize("to", [Merged, Delta, Lora])
def test_what_peft_trained_apart_from_what_it_is_tied_to_is_refused(to, tmp_path: Path):
    model = seeded(llama)
    model.save_pretrained(tmp_path / "base")
    rankwise.adapt(model, LoraAdapter(rank=2), also=lambda name: "embed" in name)
    adapter = written(tmp_path, moved(model), "peft")
    file, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    save_file({name: value for name, value in load_file(file).items() if "lm_head" not in name}, file)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"ensure_weight_tying": False}))
    with pytest.raises(ValueError, match=r"lm_head.weight is tied to a parameter that was trained without it"):
        rankwise.export(adapter, to(base=str(tmp_path / "base")), tmp_path / "out")


def test_what_is_tied_is_replaced_wherever_the_files_hold_it(tmp_path: Path):
    model = seeded(llama)
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    rankwise.adapt(model, LoraAdapter(rank=2), also=lambda name: "embed" in name)
    adapter = written(tmp_path, moved(model))
    rankwise.export(adapter, Merged(base=str(tmp_path / "base")), tmp_path / "out")
    merged = rankwise.load(tmp_path / "out")[0]
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(logits(merged), logits(model))


def test_a_model_with_an_encoder_is_merged(tmp_path: Path):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 64}
    model = seeded(lambda: T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)))
    model.save_pretrained(tmp_path / "base")
    rankwise.adapt(model, LoraAdapter(rank=2))
    rankwise.export(written(tmp_path, moved(model)), Merged(base=str(tmp_path / "base")), tmp_path / "out")
    batch = {"input_ids": ids(), "decoder_input_ids": ids()}
    with torch.no_grad():
        merged = T5ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(merged(**batch).logits, model(**batch).logits)


MEASURE = """
import resource, sys, torch, rankwise
from rankwise.exporters import Merged
small, large, out = sys.argv[1:]
def export(folder, name):
    rankwise.export(folder + "/rankwise", Merged(base=folder + "/base", compare=0), out + "/out-" + name)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(export(small, "small"), export(large, "large"))
"""


def test_one_part_of_a_tensor_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = seeded(llama)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    rankwise.adapt(model, LoraAdapter(rank=2))
    adapter = written(tmp_path, moved(model))
    made: list[tuple[str, weakref.ref]] = []
    original = AdaptedWeights.parts

    def watched(self: AdaptedWeights, name: str) -> Iterator[torch.Tensor]:
        for part in original(self, name):
            assert not [name for name, tensor in made if tensor() is not None]
            made.append((name, weakref.ref(part)))
            yield part
            del part

    monkeypatch.setattr(AdaptedWeights, "parts", watched)
    monkeypatch.setattr(adapted_weights, "BLOCK", 32 * 8)
    rankwise.export(adapter, Merged(base=str(tmp_path / "base"), compare=0), tmp_path / "out")
    whole = load_file(tmp_path / "out" / "model.safetensors")
    assert sorted({name for name, _ in made}) == sorted(whole)
    assert sum(name == "model.layers.0.mlp.up_proj.weight" for name, _ in made) == 48 // 8


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux", reason="the largest memory of a process is measured as Linux counts it"
)
@pytest.mark.parametrize(
    ("dtype", "magnitudes", "sizes"),
    [
        (torch.float32, False, {"intermediate_size": 8192}),
        (torch.bfloat16, True, {"intermediate_size": 16384}),
        (torch.bfloat16, False, {"intermediate_size": 2048, "vocab_size": 40000}),  # no adapter on the largest
    ],
)
def test_merging_takes_less_than_twice_the_largest_tensor(
    dtype: torch.dtype, magnitudes: bool, sizes: dict[str, int], tmp_path: Path
):
    wide = {"hidden_size": 1024, "num_hidden_layers": 3, **sizes}
    for name, more in (("small", {}), ("large", wide)):
        model = llama(**more).to(dtype)
        model.save_pretrained(tmp_path / name / "base", max_shard_size="60MB")
        largest = max(p.numel() * p.element_size() for p in model.parameters())
        rankwise.adapt(model, LoraAdapter(rank=2, magnitudes=magnitudes))
        written(tmp_path / name, moved(model))
        del model
    words = [sys.executable, "-c", MEASURE, *(str(tmp_path / name) for name in ("small", "large")), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after - before < 2.0 * largest


def run(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["export", *map(str, words)])
    return done.exit_code, " ".join(done.output.split())


def test_the_command_line(tmp_path: Path):
    model = seeded(llama)
    model.save_pretrained(tmp_path / "base")
    rankwise.adapt(model, LoraAdapter(rank=2))
    adapter, base = written(tmp_path, moved(model)), tmp_path / "base"
    code, output = run(adapter, "--base", base, "--to", "merged", "--out", tmp_path / "out", "--memory", "1MiB")
    assert code == 0, output
    torch.testing.assert_close(logits(rankwise.load(tmp_path / "out")[0]), logits(model))
    for kind in ("lora", "delta", "absorbed"):
        assert run(adapter, "--base", base, "--to", kind, "--out", tmp_path / kind)[0] == 0
    code, output = run(adapter, "--to", "lora", "--out", tmp_path / "x")
    assert (code, "needs --base" in output) == (2, True)
    code, output = run(base, "--to", "dense", "--out", tmp_path / "x", "--base", base)
    assert (code, "--base is for adapters" in output) == (2, True)
    words = ("--to", "lora", "--out", tmp_path / "x", "--base", base, "--memory", "1KB")
    code, output = run(adapter, *words)
    assert (code, "--memory is for adapters and for --to delta or merged" in output) == (2, True)
    code, output = run(base, "--to", "merged", "--out", tmp_path / "x", "--base", base)
    assert (code, "give a folder with an adapter" in output) == (2, True)


def test_several_terms_and_branches(tmp_path: Path):
    model = seeded(llama)
    model.save_pretrained(tmp_path / "base")
    model.requires_grad_(False)
    site = select(model)["model.layers.0.mlp.up_proj"]
    base, (m, n) = Base(Dense(site.weight)), site.weight.shape
    low = LowRank(draw(m, 2).float(), draw(2, n).float())
    replace(
        model,
        site,
        Sum(base, Branch(low, 0.1), Product(Branch(LowRank(draw(m, 1).float(), draw(1, m).float())), base)),
    )
    adapter = written(tmp_path, model)
    out = rankwise.export(adapter, Merged(base=str(tmp_path / "base")), tmp_path / "out")
    torch.testing.assert_close(logits(rankwise.load(out)[0]), logits(model), rtol=1e-4, atol=1e-4)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, nn.Module]:
    """A base, two adapters in files of both formats, and the model with both."""
    model = seeded(llama)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    methods = {"poet": LoraAdapter(rank=2, alpha=3.0), "coder": LoraAdapter(rank=3)}
    ends = {"poet": ("q_proj", "up_proj"), "coder": ("q_proj", "down_proj")}
    for (name, method), format in zip(methods.items(), ("rankwise", "peft"), strict=True):
        rankwise.adapt(model, method, name=name, where=lambda path, _, name=name: path.endswith(ends[name]))
        rankwise.save(moved(model), tmp_path / name, format=format, name=name)  # pyright: ignore[reportArgumentType]
    rankwise.use(model, {"poet": 0.7, "coder": -0.4})
    return tmp_path, model


def test_a_weighted_sum_is_merged_cut_and_subtracted(two: tuple[Path, nn.Module]):
    folder, model = two
    wanted, base = logits(model), str(folder / "base")
    sources = {folder / "poet": 0.7, str(folder / "coder"): -0.4}
    for source, name in ((sources, "files"), (model, "memory")):
        merged = rankwise.export(source, Merged(base=base), folder / f"merged {name}")
        torch.testing.assert_close(logits(rankwise.load(merged)[0]), wanted, rtol=1e-4, atol=1e-5)
        lora = rankwise.export(source, Lora(base=base), folder / f"lora {name}")
        again = seeded(llama)
        rankwise.load_adapter(again, lora)
        torch.testing.assert_close(logits(again), wanted, rtol=1e-4, atol=1e-5)
        ranks = {path: layer.matrix.parts[1].rank for path, layer in rankwise.core.adapted.adapted(again).items()}
        assert sorted(set(ranks.values())) == [2, 3, 5]
        assert json.loads((lora / "rankwise_errors.json").read_text()).keys() == ranks.keys()
        assert not any(json.loads((lora / "rankwise_errors.json").read_text()).values())
    delta = rankwise.export(sources, Delta(base=base), folder / "delta")
    plain, folded = seeded(llama).state_dict(), rankwise.fold(model).state_dict()
    found = {name: t for file in delta.glob("*.safetensors") for name, t in load_file(file).items()}
    assert len(found) == 6
    for name, change in found.items():
        torch.testing.assert_close(change, folded[name] - plain[name], rtol=1e-4, atol=1e-5)


def test_the_command_line_takes_weights(two: tuple[Path, nn.Module]):
    folder, model = two
    words = (folder / "poet", folder / "coder", "--base", folder / "base", "--to", "merged")
    code, output = run(*words, "--out", folder / "out", "--weights", "0.7,-0.4")
    assert code == 0, output
    torch.testing.assert_close(logits(rankwise.load(folder / "out")[0]), logits(model), rtol=1e-4, atol=1e-5)
    for weights in ([], ["--weights", "1"], ["--weights", "1,x"], ["--weights", "1,nan"]):
        code, output = run(*words, "--out", folder / "x", *weights)
        assert (code, "--weights takes" in output or "finite weights" in output) == (2, True)
    code, output = run(
        folder / "base", folder / "poet", "--to", "dense", "--out", folder / "x", "--weights", "1,1"
    )
    assert (code, "--weights, are for --to" in output) == (2, True)


def test_there_is_no_sum_of_what_is_replaced(two: tuple[Path, nn.Module]):
    folder, _ = two
    model = seeded(llama)
    rankwise.adapt(model, LoraAdapter(rank=2), also=lambda name: "norm" in name)
    rankwise.save(model, folder / "norms", format="rankwise")
    with pytest.raises(ValueError, match="norms replaces parameters"):
        rankwise.export(
            {folder / "norms": 1.0, folder / "poet": 1.0}, Merged(base=str(folder / "base")), folder / "x"
        )


def test_there_is_no_sum_with_what_stands_behind_layers(two: tuple[Path, nn.Module]):
    folder, _ = two
    model = seeded(llama)
    rankwise.adapt(model, Compacter(count=2, reduction=2))
    rankwise.save(model, folder / "behind", format="rankwise")
    for source in ({folder / "behind": 1.0, folder / "poet": 1.0}, folder / "behind"):
        for to in (Delta, Lora, Merged):
            with pytest.raises(ValueError, match=r"behind has a module behind model.*use load_adapter"):
                rankwise.export(source, to(base=str(folder / "base")), folder / "x")


def test_an_adapter_is_given_once(two: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch):
    folder, _ = two
    monkeypatch.chdir(folder)
    for other in (str(folder / "poet"), "poet"):
        with pytest.raises(ValueError, match="given once"):
            rankwise.export({folder / "poet": 0.5, other: 0.5}, Delta(base=str(folder / "base")), folder / "x")


def test_a_part_for_another_model_is_named(two: tuple[Path, nn.Module]):
    folder, _ = two
    llama(initializer_range=0.5).save_pretrained(folder / "other")
    with pytest.raises(ValueError, match=r"poet \+ .*coder was made for other values of"):
        rankwise.export(
            {folder / "poet": 1.0, folder / "coder": 1.0}, Merged(base=str(folder / "other")), folder / "x"
        )


def test_outputs_are_compared_where_the_vocabulary_is_that_of_a_part(tmp_path, monkeypatch):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8),
        text_config=transformers.LlamaConfig(**sizes, vocab_size=64),
        image_token_index=63,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "base")
    rankwise.adapt(
        model, LoraAdapter(rank=2), where=lambda name, _: "language_model" in name and "q_proj" in name
    )
    compared, outputs = [], merged.outputs_of
    monkeypatch.setattr(merged, "outputs_of", lambda *words: compared.append(words) or outputs(*words))
    rankwise.export(model, Merged(base=str(tmp_path / "base")), tmp_path / "out")
    assert len(compared) == 2
