"""Statistics against what autograd and plain sums say, and their file."""

import copy

import pytest
import torch
from tiny import llama
from torch import Generator, Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
)

import rankwise
from rankwise import CalibrationError, calibrate
from rankwise.compressors import KroneckerFactoredSvd
from rankwise.core import labels
from rankwise.core.statistics import (
    AnswerGram,
    AnswerMean,
    BatchGradients,
    GradientWeightedInput,
    InputGram,
    InputMagnitude,
    InputMean,
    OutputGradGram,
    Statistics,
    WeightGradient,
)
from rankwise.core.statistics_file import load_statistics, save_statistics
from rankwise.core.surgery import StructuredLinear, select
from rankwise.core.watch import collect

ALL = (
    InputGram,
    OutputGradGram,
    InputMean,
    AnswerGram,
    AnswerMean,
    InputMagnitude,
    GradientWeightedInput,
    WeightGradient,
)


SIZES_OF_A_HALF = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}


def run(model: nn.Module, batches, needs=ALL, loss=labels.sampled, seed: int = 0) -> Statistics:
    generator = Generator().manual_seed(seed)
    return collect(model, select(model), needs, batches, labels=loss, generator=generator)


def oracle(model: nn.Module, name: str, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs (t, n) and output gradients (t, m) of one layer under the loss of the next tokens."""
    seen = {}
    layer = model.get_submodule(name)

    def hook(_, args, output):
        seen["x"] = args[0].detach().flatten(0, 1)
        output.retain_grad()
        seen["y"] = output

    handle = layer.register_forward_hook(hook)
    logits = model(ids).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    handle.remove()
    return seen["x"].double(), seen["y"].grad.flatten(0, 1).double()


def test_they_equal_autograd():
    model, ids = llama(), torch.randint(0, 64, (3, 20), generator=Generator().manual_seed(1))
    found = run(model, [ids[:2], ids[2:]], loss=labels.given)
    for name in found.layers:
        x, g = oracle(model, name, ids)
        expected = {
            InputGram: x.mT @ x / len(x),
            OutputGradGram: g.mT @ g / len(g),
            InputMean: x.mean(0),
            AnswerGram: x.mT @ x / len(x),
            AnswerMean: x.mean(0),
            InputMagnitude: x.abs().mean(0),
            GradientWeightedInput: (g.square().sum(1)[:, None] * x.square()).mean(0),
            WeightGradient: g.mT @ x / len(x),
        }
        for kind, value in expected.items():
            scale = float(value.abs().max())
            close = {"rtol": 1e-4, "atol": 1e-5 * scale}
            torch.testing.assert_close(found.layers[name][kind].value(), value, **close, msg=f"{name} {kind}")


def test_layers_with_the_same_input_share_one_statistic():
    found = run(llama(), [torch.randint(0, 64, (2, 16))], (InputGram,)).layers
    distinct = {id(stats[InputGram]) for stats in found.values()}
    assert len(found) == 14
    assert len(distinct) == 8  # qkv, o, gate and up, down in each of two blocks
    block = "model.layers.0."
    query, key, output = (found[f"{block}self_attn.{x}_proj"][InputGram] for x in "qko")
    assert query is key
    assert query is not output
    assert query.count == 32


def test_no_gradient_of_a_parameter_is_kept_and_the_model_is_as_before():
    model = llama().train()
    model.model.norm.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    run(model, [torch.randint(0, 64, (1, 8))])
    assert all(p.grad is None for p in model.parameters())
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_padding_does_not_count():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    model, ids = BertModel(config), torch.randint(0, 64, (2, 10))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    other = torch.where(mask.bool(), ids, 7)
    batches = [{"input_ids": x, "attention_mask": mask} for x in (ids, other)]
    one, two = (run(model, [batch], (InputGram, OutputGradGram), labels.automatic) for batch in batches)
    for name, stats in one.layers.items():
        assert stats[InputGram].count == (2 if "pooler" in name else 16)
        for kind, statistic in stats.items():
            torch.testing.assert_close(statistic.value(), two.layers[name][kind].value())


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("loss", [labels.sampled, labels.in_place])
def test_both_halves_of_an_encoder_decoder_have_padding_of_their_own(family: str, loss: labels.Labels):
    """Sequences of one length, whose masks differ: what stands where there is padding makes no difference."""
    torch.manual_seed(0)
    if family == "t5":
        sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
        model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    else:
        layers = {f"{half}_{what}": n for half in ("encoder", "decoder") for what, n in SIZES_OF_A_HALF.items()}
        model = BartForConditionalGeneration(BartConfig(vocab_size=64, d_model=32, **layers))
    ids, target = torch.randint(3, 64, (2, 10)), torch.randint(3, 64, (2, 10))
    read, written = torch.ones_like(ids), torch.ones_like(ids)
    read[1, 6:], written[0, 3:] = 0, 0
    target[written == 0] = labels.UNLABELLED
    before = model.prepare_decoder_input_ids_from_labels(target)

    def statistics(spoilt: int, **more: Tensor) -> Statistics:
        batch = {"input_ids": torch.where(read.bool(), ids, spoilt), "attention_mask": read, "labels": target}
        return run(model, [batch | more], (InputGram, OutputGradGram, AnswerGram), loss)

    masked = {"decoder_attention_mask": written}
    one = statistics(5, decoder_input_ids=before, **masked)
    two = statistics(9, decoder_input_ids=torch.where(written.bool(), before, 11), **masked)
    whole = statistics(5)  # of the decoder, which gets its tokens from the labels
    for name, stats in one.layers.items():
        of_encoder = ".encoder." in f".{name}" or any(
            f"{a}.{b}_proj" in name for a in ["encoder_attn"] for b in "kv"
        )
        of_encoder |= "EncDecAttention.k" in name or "EncDecAttention.v" in name
        assert stats[InputGram].count == (16 if of_encoder else 13), name
        assert stats[AnswerGram].count == (16 if of_encoder else 13), name
        assert whole.layers[name][InputGram].count == (16 if of_encoder else 20), name
        assert whole.layers[name][AnswerGram].count == (16 if of_encoder else 13), name
        for kind, statistic in stats.items():
            torch.testing.assert_close(statistic.value(), two.layers[name][kind].value())


def test_gradients_of_all_layers_are_summed_over_rows_and_divided_by_one_number():
    """So that errors of layers that see other numbers of rows are changes of one loss."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),  # 64 places
        nn.Conv2d(4, 4, 2, stride=2),  # 16
        nn.Conv2d(4, 4, 2, stride=2),  # 4
        nn.Flatten(),
        nn.Linear(16, 3),  # 1
    )
    images, targets = torch.randn(40, 2, 8, 8), torch.randint(0, 3, (40,))
    found = run(model, [(images,)], (InputGram, OutputGradGram), lambda out, *_: loss_of(out, targets))
    x, seen = images, {}
    for name, layer in model.named_children():
        x = layer(x)
        if name != "3":
            x.retain_grad()
            seen[name] = x
    loss_of(x, targets).backward()
    for name, y in seen.items():
        rows = y.grad.flatten(2).mT.flatten(0, 1) if y.dim() == 4 else y.grad
        wanted = rows.double().mT @ rows.double() / (40 * 4)  # the lower median of 64, 16, 4 and 1 places
        torch.testing.assert_close(found.layers[name][OutputGradGram].value(), wanted, rtol=1e-5, atol=1e-9)
        assert found.layers[name][InputGram].count == len(rows)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, targets, reduction="sum")


def test_gradients_of_batches_stand_by_their_numbers():
    """Also where batches did not reach the layer, and when room was made anew."""
    statistic = BatchGradients(2, 3)
    wanted = torch.zeros(6, 2, 3)
    for number in (0, 1, 3, 5):
        statistic.begin(number)
        for _ in range(2):
            x, g = torch.randn(4, 3), torch.randn(4, 2)
            statistic.update(x, g)
            wanted[number] += g.mT @ x
    torch.testing.assert_close(statistic.value(), wanted.double())


def test_sampled_labels_have_the_expected_second_moment():
    """For logits z = y the gradient is p - onehot, whose second moment is diag(p) - p p'."""
    layer = nn.Linear(1, 5, bias=False)
    found = run(nn.Sequential(layer), [torch.ones(200_000, 1)], (OutputGradGram,))
    p = layer.weight[:, 0].detach().double().softmax(0)
    expected = p.diag() - p[:, None] * p
    torch.testing.assert_close(found.layers["0"][OutputGradGram].value(), expected, rtol=0, atol=3e-3)


def test_gaussian_labels_have_unit_gradients():
    found = run(nn.Sequential(nn.Linear(3, 4)), [torch.ones(50_000, 3)], (OutputGradGram,), labels.gaussian)
    torch.testing.assert_close(
        found.layers["0"][OutputGradGram].value(), torch.eye(4).double(), rtol=0, atol=3e-2
    )


def test_a_layer_that_works_in_place_afterwards_is_no_problem():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(3 * 16, 4))
    found = run(net, [torch.randn(5, 2, 6, 6)], ALL)
    assert found.layers["0"][InputGram].count == 5 * 16
    assert found.layers["0"][OutputGradGram].value().shape == (3, 3)


def test_what_is_not_finite_is_named():
    model = llama()
    model.model.layers[1].input_layernorm.weight.data.fill_(torch.inf)
    with pytest.raises(CalibrationError, match=r"layers\.1\.self_attn\.q_proj: its inputs are not finite"):
        run(model, [torch.randint(0, 64, (1, 8))])


def test_no_data_and_unreached_layers_are_errors():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(CalibrationError, match="empty"):
        run(Half(), [])
    with pytest.raises(CalibrationError, match="layers never reached by the data: unused;"):
        run(Half(), [torch.ones(2, 3)])


def test_encoders_of_torch_are_calibrated_with_padding():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
            self.head = nn.Linear(16, 4)

        def forward(self, x, padding):
            return self.head(self.stack(x, src_key_padding_mask=padding).mean(1))

    padding = torch.zeros(4, 8, dtype=torch.bool)
    padding[:2, 6:] = True
    found = calibrate(Encoder(), [InputGram], data=[{"x": torch.randn(4, 8, 16), "padding": padding}]).layers
    assert set(found) == {"stack.layers.0.linear1", "stack.layers.0.linear2", "head"} | {
        f"stack.layers.1.linear{i}" for i in (1, 2)
    }
    assert all(stats[InputGram].count for stats in found.values())
    assert torch.backends.mha.get_fastpath_enabled()


def test_layers_that_nobody_asked_for_need_not_be_reached():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.aside = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            self.aside(x)  # the output does not depend on it
            return self.used(x)

    net, data = Partly(), [torch.randn(64, 8)]
    before = copy.deepcopy(net.state_dict())
    report = rankwise.compress(net, KroneckerFactoredSvd(), keep=0.9, data=data)
    assert report.totals["unreached"] == ["unused", "aside"]
    assert "2 that no data reached stay as they are" in report.title
    assert isinstance(net.used, StructuredLinear)
    assert all(torch.equal(before[f"{name}.weight"], getattr(net, name).weight) for name in ("unused", "aside"))
    with pytest.raises(CalibrationError, match="never reached by the data: unused;"):
        rankwise.compress(Partly(), KroneckerFactoredSvd(), keep=0.9, data=data, where=lambda *_: True)
    other = Partly()
    found = calibrate(other, KroneckerFactoredSvd().needs, data=data)
    with pytest.raises(CalibrationError, match="layer unused was never reached by the data"):
        rankwise.compress(other, KroneckerFactoredSvd(), keep=0.9, data=found, where=lambda *_: True)
    assert rankwise.compress(other, KroneckerFactoredSvd(), keep=0.9, data=found).totals["unreached"]
    with pytest.raises(CalibrationError, match="on which the loss does not depend: aside;"):
        calibrate(Partly(), [OutputGradGram], data=data, where=lambda name, _: name != "unused")
    partly = Partly()
    partly.forward = lambda x: x
    with pytest.raises(CalibrationError, match="never reached by the data: used, unused, aside;"):
        calibrate(partly, [OutputGradGram], data=data)


def test_the_file_is_read_for_its_own_model_only(tmp_path):
    model, path = llama(), tmp_path / "statistics.safetensors"
    found = run(model, [torch.randint(0, 64, (2, 16))])
    save_statistics(found, path, model, about="noise")
    again = load_statistics(path, model, "noise")
    assert again.layers.keys() == found.layers.keys()
    for name, stats in found.layers.items():
        for kind, statistic in stats.items():
            assert torch.equal(again.layers[name][kind].value(), statistic.value())
    q, k = (again.layers[f"model.layers.0.self_attn.{x}_proj"][InputGram] for x in "qk")
    assert q is k
    with pytest.raises(CalibrationError, match="other data"):
        load_statistics(path, model, "music")
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    with pytest.raises(CalibrationError, match="another model"):
        load_statistics(path, model)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CalibrationError, match="damaged"):
        load_statistics(path, model)


def test_sums_are_float32_whatever_the_default_type_is():
    before = torch.get_default_dtype()
    try:
        for kind in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(kind)
            assert InputGram(3, 5).sum.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


def test_single_images_give_what_batches_of_one_give():
    net = nn.Sequential(nn.Conv2d(3, 10, 3, padding=1))
    images = torch.randn(6, 3, 10, 10, generator=torch.Generator().manual_seed(0))

    def squares(output: Tensor, batch: Tensor, generator: torch.Generator) -> Tensor:
        return output.square().sum()

    one, two = (
        calibrate(net, [InputGram, OutputGradGram], data=list(data), labels=squares).of("0", [OutputGradGram])
        for data in (images, images[:, None])
    )
    torch.testing.assert_close(one[OutputGradGram].value(), two[OutputGradGram].value())


def test_a_layer_that_no_batch_reaches_is_named_for_gradients_too():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)

    with pytest.raises(CalibrationError, match="never reached by the data: b"):
        calibrate(Half(), [OutputGradGram], data=[torch.randn(8, 4)], where=lambda name, _: name == "b")


def test_calibration_in_inference_mode():
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(20, 4)
    expected = calibrate(model, [InputGram, OutputGradGram], data=[x])
    with torch.inference_mode():
        found = calibrate(model, [InputGram, OutputGradGram], data=[x])
    for kind in (InputGram, OutputGradGram):
        torch.testing.assert_close(found.of("0", [kind])[kind].value(), expected.of("0", [kind])[kind].value())


def test_layers_may_be_called_by_name():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(input=torch.tanh(self.first(input=x)))

    torch.manual_seed(0)
    model, x = Named(), torch.randn(40, 6)
    found = calibrate(model, [InputGram], data=[x])
    gram = found.of("first", [InputGram])[InputGram].value()
    torch.testing.assert_close(gram, x.mT @ x / 40, check_dtype=False)
    rankwise.compress(model, KroneckerFactoredSvd(), keep=0.9, data=[x], where=lambda name, _: name == "first")
    assert isinstance(model.first, StructuredLinear)
    assert model(x).shape == (40, 3)


def test_blocks_whose_layers_are_called_by_name_are_fitted_in_order():
    class Block(nn.Module):
        def __init__(self, named: bool) -> None:
            super().__init__()
            self.layer, self.named = nn.Linear(8, 8), named

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(self.layer(input=x) if self.named else self.layer(x))

    class Blocks(nn.Module):
        def __init__(self, named: bool) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(named) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    made, x = [], torch.randn(4, 20, 8, generator=torch.Generator().manual_seed(0))
    for named in (True, False):
        torch.manual_seed(0)
        model = Blocks(named)
        rankwise.compress(model, KroneckerFactoredSvd(), keep=0.7, data=[x], sequential=True)
        assert any(isinstance(block.layer, StructuredLinear) for block in model.blocks)
        made.append(model(x))
    torch.testing.assert_close(*made)


def test_rows_may_come_alone_and_outputs_in_tuples():
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), x

    net = nn.Sequential(nn.Linear(4, 5), Pair(5, 3))
    samples = list(torch.randn(40, 4, generator=torch.Generator().manual_seed(0)))
    found = calibrate(net, [InputGram, OutputGradGram], data=samples, labels=labels.gaussian)
    assert found.of("0", [InputGram])[InputGram].count == 40


@pytest.mark.parametrize("order", ["fgf", "gff", "ffg", "fghf", "fgfh", "gfhf"])
def test_a_layer_that_is_called_again_shares_nothing(order: str):
    """The others see the same inputs once, and share their sums."""

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g, self.h = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            total, other = x * 0, x * 10
            for i, name in enumerate(order):
                total = total + getattr(self, name)(other if name == "f" and "f" in order[:i] else x)
            return total

    batches = [torch.randn(9, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    found, x = (
        calibrate(Calls(), [InputGram], data=batches, where=lambda name, _: name in order),
        torch.cat(batches),
    )
    gram = x.double().mT @ x.double() / len(x)
    for name in set(order):
        statistic = found.of(name, [InputGram])[InputGram]
        assert statistic.count == len(x) * (1 + (name == "f"))
        torch.testing.assert_close(statistic.value(), gram * (50.5 if name == "f" else 1.0), rtol=1e-5, atol=1e-5)
    if "h" in order:
        assert found.of("g", [InputGram])[InputGram] is found.of("h", [InputGram])[InputGram]
