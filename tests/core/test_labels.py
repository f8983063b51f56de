"""Which numbers of an output are held against which labels."""

import pytest
import torch
from torch import Generator, nn
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification

import rankwise
from rankwise.compressors import KroneckerFactoredSvd
from rankwise.core import labels

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
BERT = {**SIZES, "num_attention_heads": 4, "max_position_embeddings": 64}


def gradient(loss, logits, batch=()):
    logits.requires_grad_()
    return torch.autograd.grad(loss(logits, batch, Generator().manual_seed(0)), logits)[0]


def test_classes_of_images_stand_in_front():
    logits = torch.randn(2, 5, 3, 4)
    drawn = gradient(labels.automatic, logits)
    assert float(drawn.sum(1).abs().max()) < 1e-6  # as softmax has it
    assert float(drawn.sum(3).abs().max()) > 0.1
    target = torch.randint(0, 5, (2, 3, 4))
    found = gradient(labels.given, logits, (logits, target))
    expected = gradient(lambda x, *_: nn.functional.cross_entropy(x, target, reduction="sum"), logits)
    torch.testing.assert_close(found, expected)


def test_one_output_is_a_regression():
    net, data = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1)), torch.randn(64, 16)
    report = rankwise.compress(net, KroneckerFactoredSvd(), keep=0.7, data=[data])
    assert float(report.rows[0]["measured_error"]) > 0
    output, target = torch.randn(6, 1), torch.randn(6)
    torch.testing.assert_close(
        gradient(labels.given, output, (output, target)), (output - target[:, None]).detach()
    )
    with pytest.raises(ValueError, match="labels of several classes are integers"):
        labels.given(torch.randn(6, 3), (output, target), Generator())


def test_a_loss_among_outputs_is_no_output():
    ids = torch.randint(0, 64, (4, 16), generator=Generator().manual_seed(0))
    place = torch.arange(4)
    model = BertForQuestionAnswering(BertConfig(**BERT)).eval()
    data = [{"input_ids": ids, "start_positions": place, "end_positions": place + 1}]
    assert rankwise.compress(model, KroneckerFactoredSvd(), keep=0.7, data=data).rows
    classifier = BertForSequenceClassification(BertConfig(**BERT)).eval()
    report = rankwise.narrow(classifier, keep=0.9, data=[{"input_ids": ids, "labels": place % 2}])
    assert report.totals["keep"]["params"] <= 0.9
