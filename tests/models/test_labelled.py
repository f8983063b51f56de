"""Labels are held against the logits that they are for: of models of every kind, as the models' own losses."""

from typing import Any

import pytest
import torch
from tiny import llama
from torch import Generator, Tensor, nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import rankwise
from rankwise.core import labels
from rankwise.core.statistics import OutputGradGram

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def ids(seed: int) -> Tensor:
    return torch.randint(3, 64, (4, 12), generator=Generator().manual_seed(seed))


def tagger() -> tuple[Any, dict[str, Tensor]]:
    model = BertForTokenClassification(BertConfig(vocab_size=64, num_labels=3, **SIZES))
    return model, {"input_ids": ids(0), "attention_mask": torch.ones_like(ids(0)), "labels": ids(0) % 3}


def masked() -> tuple[Any, dict[str, Tensor]]:
    places = torch.zeros(4, 12, dtype=torch.bool)
    places[:, [0, 5]] = True  # the first token's label counts, too
    batch = {"input_ids": ids(0).masked_fill(places, 2), "labels": ids(0).masked_fill(~places, -100)}
    return BertForMaskedLM(BertConfig(vocab_size=64, **SIZES)), batch


def translator() -> tuple[Any, dict[str, Tensor]]:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes))
    before = model.prepare_decoder_input_ids_from_labels(ids(1))
    return model, {"input_ids": ids(0), "labels": ids(1), "decoder_input_ids": before}


def causal() -> tuple[Any, dict[str, Tensor]]:
    return llama(), {"input_ids": ids(0), "labels": ids(0).masked_fill(ids(0) % 3 == 0, -100)}


KINDS = {"tagger": tagger, "masked": masked, "translator": translator, "causal": causal}


def own_loss(model: Any, batch: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return float(model.eval()(**batch).loss)


class Wrapped(nn.Module):
    """A model inside another module, as launchers and adapters of other libraries have it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Tensor) -> Any:
        return self.inner(**inputs)


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapped], ids=["plain", "wrapped"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_loss_is_the_models_own(kind: Any, wrap: Any):
    torch.manual_seed(0)
    model, batch = kind()
    expected = own_loss(model, batch)
    options: dict[str, Any] = {"held_out": [batch], "steps": 1}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for report in (
        rankwise.finetune(wrap(model), [batch, batch], optimizer=optimizer, **options),
        rankwise.train(wrap(model), [batch, batch], optimizer, **options),
    ):
        assert report.totals["held_out"]["before"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("kind", "layer"), [(tagger, "classifier"), (causal, "v_proj")])
def test_statistics_take_the_same_labels(kind: Any, layer: str):
    torch.manual_seed(0)
    model, batch = kind()
    first, second = (
        rankwise.calibrate(model, (OutputGradGram,), data=[batch], labels=each, where=lambda n, _: layer in n)
        for each in (labels.given, labels.in_place)
    )
    assert first.layers.keys() == second.layers.keys()
    for name, found in first.layers.items():
        same = torch.equal(found[OutputGradGram].value(), second.layers[name][OutputGradGram].value())
        assert same == (kind is tagger)


class Tagger(nn.Module):
    """Says of each token a class."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Embedding(64, 8), nn.Linear(8, 64)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.leave(self.enter(input_ids))


@pytest.mark.parametrize("named", [False, True])
def test_labels_of_a_plain_module_stand_where_they_are(named: bool):
    torch.manual_seed(0)
    net, x = Tagger(), ids(0)
    y = (x * 3 + 1) % 64
    batch: Any = {"input_ids": x, "labels": y} if named else (x, y)
    expected = functional.cross_entropy(net(x).flatten(0, 1), y.flatten()).item()
    report = rankwise.finetune(net, [batch, batch], held_out=[batch], steps=1)
    assert report.totals["held_out"]["before"] == pytest.approx(expected, rel=1e-5)
    assert report.rows[-1]["rows"] == y.numel()
    other = rankwise.finetune(Tagger(), [batch, batch], held_out=[batch], steps=1, loss=own)
    assert other.rows[-1]["rows"] == y.numel()


def own(output: Tensor, batch: Any, generator: Generator) -> Tensor:
    """A loss of a user, who is told the batch as it is."""
    y = batch["labels"] if isinstance(batch, dict) else batch[1]
    return functional.cross_entropy(output.flatten(0, 1), y.flatten(), reduction="sum")


def test_positional_labels_of_a_causal_model_are_one_ahead():
    model, batch = causal()
    expected = own_loss(model, batch)
    data = [(batch["input_ids"], batch["labels"])] * 2
    told = rankwise.finetune(model, data, held_out=data[:1], steps=1).totals["held_out"]
    assert told["before"] == pytest.approx(expected, rel=1e-5)


def test_tokens_without_labels_are_the_next_ones():
    torch.manual_seed(0)
    net, x = Tagger(), ids(0)
    expected = functional.cross_entropy(net(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten()).item()
    told = rankwise.finetune(net, [x, x], held_out=[x], steps=1).totals["held_out"]
    assert told["before"] == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_meant_is_named():
    x = ids(0)
    for batch in ((x, x), {"input_ids": x, "labels": x.masked_fill(x % 2 == 0, -100)}):
        with pytest.raises(ValueError, match="leave them out to learn the next tokens"):
            rankwise.finetune(Tagger(), [batch, batch], steps=1)
    short = (x, x[:, :5] % 3)
    with pytest.raises(ValueError, match=r"20 labels for logits of shape \(4, 12, 64\)"):
        rankwise.finetune(Tagger(), [short, short], steps=1)
    model, batch = translator()
    del batch["decoder_input_ids"]
    with pytest.raises(ValueError, match="add decoder_input_ids"):
        rankwise.finetune(model, [batch, batch], steps=1)
