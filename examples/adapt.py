"""Teach a language model a text of another kind with few trained numbers, and fold them into its weights.

Run it as ``python examples/adapt.py``, or with ``--smoke`` on a tiny random model, in a few seconds.
"""

import argparse
from typing import Any

import torch

import rankwise


def smoke_model() -> Any:
    """A random Llama of two layers, which takes the bytes of a text as tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.1))


def main(smoke: bool, steps: int, rank: int) -> tuple[float, float]:
    """Adapt a model to Python source code; returns its loss on other code before and after, in nats a token."""
    text = rankwise.models.embedded_texts()["python"]
    if smoke:
        model, ids = smoke_model(), torch.tensor(list(text[:8192].encode()))
    else:
        model, tokenizer = rankwise.load("smollm2-135m", dtype=torch.bfloat16)
        ids = rankwise.models.tokens(tokenizer, text, limit=20_000)
    window = 64 if smoke else 512
    cut = len(ids) * 9 // 10
    train, judges = ids[:cut], ids[cut:]

    # Statistics come from the text that is to be learned; the model computes what it did.
    method = rankwise.adapters.Eva(rank=rank)
    report = rankwise.adapt(model, method, data=train[:4096], window=window)
    print(report.title, f"{report.totals['trained']:,} of {report.totals['params']:,} numbers train", sep="; ")

    report = rankwise.finetune(
        model,
        train,
        held_out=rankwise.core.data.batches_of(judges, window=window),
        lr=5e-3 if smoke else 5e-4,
        steps=steps,
        window=window,
        autocast=None if smoke else torch.bfloat16,
    )
    print(report.table())

    before = model(judges[None, :window]).logits
    rankwise.fold(model)  # ordinary layers again, which need no rankwise
    change = (model(judges[None, :window]).logits - before).abs().max()
    print(f"folded: no logit moves by more than {change:.1e}")
    held_out = report.totals["held_out"]
    return held_out["before"], held_out["after"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny random model")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rank", type=int, default=4)
    words = parser.parse_args()
    main(words.smoke, words.steps, words.rank)
