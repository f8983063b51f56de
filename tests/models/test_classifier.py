"""An adapted classifier ends as a folder that plain transformers opens: head, names of classes, and logits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from contracts.examples import draw
from safetensors.torch import load_file
from tiny import WORDS, llama, worded
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaForSequenceClassification,
)

import rankwise
from rankwise.adapters import FactorLora, Lora
from rankwise.compressors import PlainSvd
from rankwise.exporters import Merged
from rankwise.models import load_classifier, read_labels
from rankwise.models.classifier import is_head

LABELS = ("bad", "fair", "good")
COUNT = len(WORDS) + 3


def bert() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertModel(BertConfig(**sizes, vocab_size=COUNT))


def language_model(**changes) -> Any:
    return llama(vocab_size=COUNT, initializer_range=0.2, bos_token_id=0, eos_token_id=1, **changes)


def compressed() -> Any:
    model = language_model()
    rankwise.compress(model, PlainSvd(), keep=0.7)
    return model


def other_head() -> Any:
    whole = language_model().config
    whole.num_labels, whole.pad_token_id = 2, 1
    return LlamaForSequenceClassification(whole)


BASES: dict[str, Callable[[], Any]] = {
    "a language model": language_model,
    "untied": lambda: language_model(tie_word_embeddings=False),
    "an encoder": bert,  # its files lack the prefix that the classifier's have
    "compressed": compressed,
    "another head": other_head,
}


def inputs(tokenizer: Any) -> dict[str, Tensor]:
    texts = [" ".join(WORDS[i : i + 3 + i % 2]) for i in range(6)]
    return dict(tokenizer(texts, padding=True, return_tensors="pt"))


@pytest.fixture(params=BASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any, Tensor]:
    """A folder with a base and a trained adapter, the adapted model, and its logits."""
    rankwise.save(BASES[request.param](), tmp_path / "base", worded())
    model, tokenizer = load_classifier(tmp_path / "base", LABELS)
    rankwise.adapt(
        model,
        Lora(rank=2),
        where=lambda name, _: not is_head(model, name),
        also=lambda name: is_head(model, name),
    )
    with torch.no_grad():
        for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * draw(*parameter.shape, seed=i).float())
        logits = model(**inputs(tokenizer)).logits
    rankwise.save(model, tmp_path / "adapter", format="rankwise")
    return tmp_path, model, logits


def opened(folder: Path) -> Tensor:
    """The logits that plain transformers gets from a folder."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert tuple(model.config.id2label[i] for i in range(len(LABELS))) == LABELS
    assert model.config.label2id == {label: i for i, label in enumerate(LABELS)}
    with torch.no_grad():
        return model(**inputs(AutoTokenizer.from_pretrained(folder))).logits


def test_merged_it_is_a_folder_of_transformers(case: tuple[Path, Any, Tensor]):
    folder, _, logits = case
    rankwise.export(folder / "adapter", rankwise.exporters.Merged(base=str(folder / "base")), folder / "out")
    torch.testing.assert_close(opened(folder / "out"), logits, rtol=1e-4, atol=1e-5)
    assert not any("lm_head" in name for name in load_file(folder / "out" / "model.safetensors"))


def test_loaded_and_folded_it_is_one_too(case: tuple[Path, Any, Tensor]):
    folder, _, logits = case
    assert read_labels(folder / "adapter") == LABELS
    model, tokenizer = load_classifier(folder / "base", read_labels(folder / "adapter"), seed=5)
    rankwise.load_adapter(model, folder / "adapter")
    with torch.no_grad():
        assert torch.equal(model(**inputs(tokenizer)).logits, logits)
    rankwise.save(rankwise.fold(model), folder / "out", tokenizer)
    torch.testing.assert_close(opened(folder / "out"), logits, rtol=1e-4, atol=1e-5)


def test_one_output_alone_has_no_classes(tmp_path: Path):
    """As that of a reward model."""
    config = language_model().config
    config.num_labels, config.pad_token_id = 1, 1
    model, again = (LlamaForSequenceClassification(config).eval() for _ in range(2))
    again.load_state_dict(model.state_dict())
    rankwise.adapt(model, Lora(rank=2), also=lambda name: is_head(model, name))
    with torch.no_grad():
        for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * draw(*parameter.shape, seed=i).float())
        logits = model(torch.arange(24).view(2, 12)).logits
    rankwise.save(model, tmp_path / "adapter", format="rankwise")
    assert read_labels(tmp_path / "adapter") == ()
    (tmp_path / "adapter" / "labels.json").write_text('["LABEL_0"]')  # as written before
    rankwise.load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(torch.arange(24).view(2, 12)).logits, logits)


@pytest.mark.parametrize("to", [rankwise.exporters.Merged, rankwise.exporters.Absorbed])
def test_classes_have_the_names_of_the_adapter(to: Any, tmp_path: Path):
    """Though the base has them in another order."""
    config = language_model().config
    config.num_labels, config.pad_token_id = 2, 1
    config.id2label, config.label2id = {0: "a", 1: "b"}, {"a": 0, "b": 1}
    rankwise.save(LlamaForSequenceClassification(config), tmp_path / "base", worded())
    model, _ = load_classifier(tmp_path / "base", ("a", "b"))
    model.config.id2label, model.config.label2id = {0: "b", 1: "a"}, {"b": 0, "a": 1}
    method = Lora(rank=2) if to is rankwise.exporters.Merged else FactorLora(rank=2)
    if to is rankwise.exporters.Absorbed:
        rankwise.compress(model, PlainSvd(), keep=0.7, where=lambda name, _: not is_head(model, name))
        rankwise.save(model, tmp_path / "small", worded())
        base = tmp_path / "small"
    else:
        base = tmp_path / "base"
    rankwise.adapt(model, method, also=lambda name: is_head(model, name))
    rankwise.save(model, tmp_path / "adapter", format="rankwise")
    rankwise.export(tmp_path / "adapter", to(base=str(base)), tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["id2label"] == {"0": "b", "1": "a"}


def test_as_a_lora_it_has_head_and_labels(case: tuple[Path, Any, Tensor]):
    folder, _, logits = case
    rankwise.export(folder / "adapter", rankwise.exporters.Lora(base=str(folder / "base")), folder / "out")
    model, tokenizer = load_classifier(folder / "base", read_labels(folder / "out"), seed=5)
    rankwise.load_adapter(model, folder / "out")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs(tokenizer)).logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["a language model"], indirect=True)
def test_what_it_is_not_put_on_is_named(case: tuple[Path, Any, Tensor]):
    folder, _, _ = case
    with pytest.raises(ValueError, match=r"of a classifier with the labels bad, fair, good.*load_classifier"):
        rankwise.load_adapter(rankwise.load(folder / "base")[0], folder / "adapter")
    two, _ = load_classifier(folder / "base", ["yes", "no"])
    with pytest.raises(ValueError, match="of a classifier with the labels bad, fair, good"):
        rankwise.load_adapter(two, folder / "adapter")
    with pytest.raises(ValueError, match=r"score\.weight is of a new head, .*export to merged"):
        rankwise.export(folder / "adapter", rankwise.exporters.Delta(base=str(folder / "base")), folder / "out")
    unnamed = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=3, pad_token_id=1)
    rankwise.load_adapter(unnamed, folder / "adapter")
    assert unnamed.config.id2label == dict(enumerate(LABELS))
    (folder / "adapter" / "labels.json").write_text(json.dumps({"bad": 0}))
    with pytest.raises(ValueError, match=r"labels\.json is damaged: it must hold a list of different words"):
        rankwise.load_adapter(two, folder / "adapter")


@pytest.mark.parametrize("build", [language_model, bert])
def test_adapters_with_names_are_for_heads_that_are_saved(build: Callable[[], Any], tmp_path: Path):
    rankwise.save(build(), tmp_path / "base", worded())
    model, tokenizer = load_classifier(tmp_path / "base", LABELS)
    before = [name for name, _ in model.named_parameters()]
    for where in (None, lambda name, layer: not is_head(model, name)):
        with pytest.raises(
            ValueError, match=r"head of this classifier is new .*\.weight.*; or train the head, save"
        ):
            rankwise.adapt(model, Lora(rank=2), name="mood", where=where)
    assert [name for name, _ in model.named_parameters()] == before
    rankwise.save(model, tmp_path / "whole", tokenizer)
    model, _ = load_classifier(tmp_path / "whole", LABELS)
    rankwise.adapt(model, Lora(rank=2), name="mood")
    with torch.no_grad():
        for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * draw(*parameter.shape, seed=i).float())
        logits = model(**inputs(tokenizer)).logits
    rankwise.save(model, tmp_path / "adapter", format="rankwise", name="mood")
    merged = rankwise.exporters.Merged(base=str(tmp_path / "whole"))
    rankwise.export(tmp_path / "adapter", merged, tmp_path / "out")
    torch.testing.assert_close(opened(tmp_path / "out"), logits, rtol=1e-4, atol=1e-5)


def test_a_head_of_another_size_is_new(tmp_path: Path):
    rankwise.save(other_head(), tmp_path / "base", worded())
    model, _ = load_classifier(tmp_path / "base", LABELS)
    with pytest.raises(ValueError, match=r"is new and random \(score\.weight\)"):
        rankwise.adapt(model, Lora(rank=2), name="mood")


def test_absorbed_it_is_a_classifier_too(tmp_path: Path):
    rankwise.save(compressed(), tmp_path / "base", worded())
    model, tokenizer = load_classifier(tmp_path / "base", LABELS)
    rankwise.adapt(model, FactorLora(rank=2), also=lambda name: is_head(model, name))
    with torch.no_grad():
        for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * draw(*parameter.shape, seed=i).float())
        logits = model(**inputs(tokenizer)).logits
    rankwise.save(model, tmp_path / "adapter", format="rankwise")
    rankwise.export(
        tmp_path / "adapter", rankwise.exporters.Absorbed(base=str(tmp_path / "base")), tmp_path / "out"
    )
    torch.testing.assert_close(opened(tmp_path / "out"), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", ["a language model", "another head"])
def test_a_head_without_values_is_not_drawn_anew(base: str, tmp_path: Path):
    rankwise.save(BASES[base](), tmp_path / "base", worded())
    model, tokenizer = load_classifier(tmp_path / "base", LABELS)
    rankwise.save(model, tmp_path / "classifier", tokenizer)
    rankwise.adapt(model, Lora(rank=2), where=lambda name, _: not is_head(model, name))
    rankwise.save(model, tmp_path / "adapter", format="rankwise")
    for to in (rankwise.exporters.Absorbed, rankwise.exporters.Merged):
        with pytest.raises(ValueError, match=r"score\.weight is of a new head.*save the classifier before"):
            rankwise.export(tmp_path / "adapter", to(base=str(tmp_path / "base")), tmp_path / "out")
        out = rankwise.export(tmp_path / "adapter", to(base=str(tmp_path / "classifier")), tmp_path / to.__name__)
        torch.testing.assert_close(opened(out), model(**inputs(tokenizer)).logits.detach())


def test_a_classifier_of_sounds_needs_no_tokenizer(tmp_path: Path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    waves = {"conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embeddings": 16}
    config = transformers.HubertConfig(
        **sizes, **waves, num_conv_pos_embedding_groups=4, classifier_proj_size=16, num_labels=3
    )
    model, x = transformers.HubertForSequenceClassification(config).eval(), torch.randn(2, 400)
    model.save_pretrained(tmp_path / "base")
    rankwise.adapt(model, Lora(rank=2))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0, 0.1)
    rankwise.save(model, tmp_path / "adapter", format="rankwise")
    rankwise.export(tmp_path / "adapter", Merged(base=str(tmp_path / "base")), tmp_path / "merged")
    merged = transformers.HubertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(x).logits, model(x).logits)
