"""Two adapters on one model: switch between them, mix them, and answer a batch with one for each row.

Run it as ``python examples/adapters.py``, or with ``--smoke`` on a tiny random model, in a few seconds.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

import rankwise


def smoke_model() -> Any:
    """A random Llama of two layers, which takes the bytes of a text as tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.1))


def loss(model: Any, ids: torch.Tensor) -> float:
    """Nats a token."""
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


def main(smoke: bool, steps: int) -> dict[str, dict[str, float]]:
    """Teach two texts to one model; returns the loss of each choice of adapters on each text."""
    if smoke:
        model, window = smoke_model(), 64
        texts = {
            name: torch.tensor(list(t[:8192].encode())) for name, t in rankwise.models.embedded_texts().items()
        }
    else:
        model, tokenizer = rankwise.load("smollm2-135m", dtype=torch.bfloat16)
        embedded, window = rankwise.models.embedded_texts(), 512
        texts = {name: rankwise.models.tokens(tokenizer, t, limit=20_000) for name, t in embedded.items()}

    # Each is made and trained for the model alone; what is in use trains, and nothing else.
    methods = [rankwise.adapters.Lora(rank=8), rankwise.adapters.Lora(rank=8, magnitudes=True)]
    for (name, ids), method in zip(texts.items(), methods, strict=False):
        rankwise.adapt(model, method, name=name)
        lr = 5e-3 if smoke else 5e-4
        print(rankwise.finetune(model, ids, held_out=0.1, steps=steps, lr=lr, window=window).title)
    first, second = rankwise.adapters_of(model)
    judges = {name: texts[name][-2 * window :].view(2, window) for name in (first, second)}

    # Switch, mix, and do without: the weights under the adapters never change.
    found = {}
    for words, choice in {first: first, second: second, "both": {first: 0.5, second: 0.5}, "none": None}.items():
        with rankwise.use(model, choice):
            found[words] = {name: loss(model, ids) for name, ids in judges.items()}
            print(words, found[words])

    # One for each row of a batch, also in generation; a row without one goes through the model itself.
    prompts = torch.stack([texts[name][:16] for name in (first, second, first)])
    with rankwise.use(model, [first, second, None]):
        print(model.generate(prompts, max_new_tokens=8, do_sample=False, pad_token_id=0).shape)

    # Any of them, or a mix as one adapter, can be saved, and folded into the weights.
    rankwise.use(model, {first: 0.5, second: 0.5})
    with tempfile.TemporaryDirectory() as folder:
        rankwise.save(model, Path(folder) / "mix", format="rankwise")
        rankwise.save(model, Path(folder) / first, format="peft", name=first)
    print(type(rankwise.fold(model)).__name__, "without adapters, as an ordinary model of transformers")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny random model")
    parser.add_argument("--steps", type=int, default=30)
    words = parser.parse_args()
    main(words.smoke, words.steps)
