"""Do PEFT's files mean the same here and there? Writes benchmarks/results/peft_interop.json.

Each adapter is attached on one side, given random numbers, written, and read on the other side: the largest
difference of logits in float32, and the keys that PEFT misses or does not expect; beside it the largest change of
logits that the adapter makes. On small random models.
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from common import Rows
from torch import Generator, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    logging,
)

import rankwise
from rankwise.adapters import Bat, Eva, Lora, Miss
from rankwise.core.surgery import replace, select
from rankwise.initialisers import SingularVectors
from rankwise.matrices import Base, Branch, Dense, Diagonal, Product, Sum

RESULT = Path(__file__).parent / "results" / "peft_interop.json"
SIZES = {"vocab_size": 96, "bos_token_id": 0, "eos_token_id": 1}
LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
GPT2 = {"n_positions": 64, "n_embd": 64, "n_layer": 3, "n_head": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
MIXTURE = {**SIZES, **HEADS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
MIXTURES: dict[
    str, Callable[[], Any]
] = {  # which store experts as (m, n), as (n, m), and so without a word of it
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**MIXTURE, num_local_experts=3, initializer_range=0.1)),
    "gpt-oss": lambda: GptOssForCausalLM(GptOssConfig(**MIXTURE, num_local_experts=4, initializer_range=0.1)),
    "llama4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(**MIXTURE, num_local_experts=3, intermediate_size_mlp=80, initializer_range=0.1)
    ),
}
HALF = {"llama": "q_proj", "gpt2": "c_attn"}
OTHER = {"llama": "down_proj", "gpt2": "c_fc"}


def build(name: str) -> Any:
    """A random model in evaluation mode, the same at each call."""
    torch.manual_seed(0)
    if name in MIXTURES:
        return MIXTURES[name]().eval()
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**SIZES, **GPT2)).eval()
    tied = name == "llama"
    return LlamaForCausalLM(LlamaConfig(**SIZES, **LLAMA, num_key_value_heads=2, tie_word_embeddings=tied)).eval()


def ids() -> torch.Tensor:
    """(4, 32) random tokens."""
    return torch.randint(2, 96, (4, 32), generator=Generator().manual_seed(1))


def moved(model: nn.Module) -> None:
    """Add random numbers to all that trains."""
    generator = Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))


def difference(one: nn.Module, other: nn.Module) -> float:
    """The largest one of logits."""
    with torch.no_grad():
        return float((one.eval()(ids()).logits - other.eval()(ids()).logits).abs().max())


def triplets(model: nn.Module) -> None:
    """Adapters in AdaLoRA's form, of two ranks."""
    generator = Generator().manual_seed(3)
    model.requires_grad_(False)
    for i, site in enumerate(select(model).values()):
        m, n, r = *site.weight.shape, 4 - i % 2
        left, values, right = (torch.randn(*size, generator=generator) for size in ((m, r), (r,), (r, n)))
        inner = Product(Dense(0.1 * left), Diagonal(values), Dense(0.1 * right))
        replace(model, site, Sum(Base(Dense(site.weight)), Branch(inner, 1.5)))


def ours(**more: Any) -> Callable[[Any], None]:
    """Attach by :func:`rankwise.adapt`."""
    return lambda model: rankwise.adapt(model, **{"data": [ids()], **more}) and None


def inner(name: str, layer: nn.Module) -> bool:
    """Experts and queries."""
    return ".experts" in name or name.endswith("q_proj")


def second(name: str, layer: nn.Module) -> bool:
    """One of two parameters of the experts."""
    return ".experts.down_proj" in name


WRITTEN: dict[str, tuple[tuple[str, ...], Callable[[Any], None]]] = {
    "LORA": (("llama", "gpt2"), ours(method=Lora(rank=4, alpha=6.0))),
    "LORA, rsLoRA": (("llama", "gpt2"), ours(method=Lora(rank=4, alpha=6.0, rank_stabilised=True))),
    "LORA, DoRA": (("llama", "gpt2"), ours(method=Lora(rank=4, alpha=6.0, magnitudes=True))),
    "LORA, rank_pattern": (("llama", "gpt2"), ours(method=Eva(rank=4, alpha=6.0))),
    "LORA, start of twice the rank": (("llama", "gpt2"), ours(method=Lora(rank=4, start=SingularVectors()))),
    "ADALORA, two ranks": (("llama", "gpt2"), triplets),
    "MISS": (("llama", "gpt2"), ours(method=Miss(rank=4))),
    "MISS, mini": (("llama", "gpt2"), ours(method=Miss(rank=4, mini=8))),
    "MISS, bat": (("llama",), ours(method=Bat(block=4))),
    "LORA, norms saved": (("llama", "gpt2"), ours(method=Lora(rank=4), also=lambda n: "norm" in n or "ln_" in n)),
    "LORA, biases": (("gpt2",), ours(method=Lora(rank=4), also=lambda n: n.endswith("bias") and "ln" not in n)),
    "LORA, head saved": (("llama untied",), ours(method=Lora(rank=4), also=lambda n: "lm_head" in n)),
    "LORA, tied embeddings saved": (("llama",), ours(method=Lora(rank=4), also=lambda n: "embed_tokens" in n)),
    "LORA, experts": (tuple(MIXTURES), ours(method=Lora(rank=4, alpha=6.0), where=inner)),
    "LORA, experts of several ranks": (tuple(MIXTURES), ours(method=Eva(rank=4, alpha=6.0), where=inner)),
    "LORA, experts, one of two": (tuple(MIXTURES), ours(method=Lora(rank=4), where=second)),
    "LORA, head adapted": (("llama untied",), ours(method=Lora(rank=4), where=lambda n, layer: True)),
    "LORA, embeddings adapted": (("llama untied",), ours(method=Lora(rank=4), embeddings=True)),
}


def theirs(name: str) -> dict[str, Any]:
    """PEFT's descriptions for a model."""
    if name in MIXTURES:
        up, down = "experts.gate_up_proj", "experts.down_proj"
        both: dict[str, Any] = {"target_parameters": [down, up], "lora_alpha": 6}
        return {
            "LORA, experts": peft.LoraConfig(r=4, target_modules=["q_proj"], **both),
            "LORA, experts, patterns": peft.LoraConfig(
                r=4, target_modules=[], rank_pattern={down: 2}, alpha_pattern={"gate_up_proj": 3}, **both
            ),
            "LORA, experts, rsLoRA": peft.LoraConfig(r=4, target_modules=[], use_rslora=True, **both),
            "LORA, experts, one of two": peft.LoraConfig(r=4, target_modules=[], target_parameters=[up]),
        }
    kind = name.split()[0]
    usual: dict[str, Any] = {"target_modules": [HALF[kind], OTHER[kind]]}
    lora = {**usual, "r": 4, "lora_alpha": 6}
    patterns = {"rank_pattern": {HALF[kind]: 2}, "alpha_pattern": {f".*1.*{OTHER[kind]}": 3}}
    if name == "llama untied":
        return {
            "LORA, head saved": peft.LoraConfig(**lora, modules_to_save=["lm_head"]),
            "LORA, head adapted": peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"]),
            "LORA, all-linear": peft.LoraConfig(r=4, target_modules="all-linear"),
            "LORA, embeddings adapted": peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
        }
    norm = {"llama": "norm", "gpt2": "ln_f"}[kind]
    found = {
        "LORA": peft.LoraConfig(**lora),
        "LORA, rsLoRA": peft.LoraConfig(**lora, use_rslora=True),
        "LORA, DoRA": peft.LoraConfig(**lora, use_dora=True),
        "LORA, rank_pattern and alpha_pattern": peft.LoraConfig(**lora, **patterns),
        "LORA, rsLoRA and patterns": peft.LoraConfig(**lora, **patterns, use_rslora=True),
        "LORA, some blocks": peft.LoraConfig(**lora, layers_to_transform=[0, 2]),
        "LORA, norms saved": peft.LoraConfig(**lora, modules_to_save=[norm]),
        "LORA, biases": peft.LoraConfig(**lora, bias="lora_only"),
        "ADALORA": peft.AdaLoraConfig(**usual, init_r=4, lora_alpha=6, total_step=10),
    }
    if name == "llama":
        found["HRA"] = peft.HRAConfig(**usual, r=3)
        found["HRA, Gram-Schmidt"] = peft.HRAConfig(**usual, r=3, apply_GS=True)
        found["LOKR"] = peft.LoKrConfig(**usual, r=2, alpha=6, decompose_both=True)
        found["LOHA"] = peft.LoHaConfig(**usual, r=2, alpha=6)
        found["MISS"] = peft.MissConfig(**usual, r=5)
        found["MISS, mini"] = peft.MissConfig(**usual, r=4, mini_r=8, init_weights="mini")
        found["MISS, bat"] = peft.MissConfig(**usual, r=4, init_weights="bat")
        tied = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
        found["LORA, tied embeddings saved"] = peft.LoraConfig(**lora, **tied)
    return found


def to_peft(rows: Rows, work: Path) -> None:
    """Ours, read by PEFT."""
    for case, (names, attach) in WRITTEN.items():
        for name in names:
            if rows.has(direction="rankwise to peft", case=case, model=name):
                continue
            model, other, again = build(name), build(name), build(name)
            attach(model)
            moved(model)
            folder = rankwise.save(model, work / f"{name} {case}", format="peft")
            config = peft.PeftConfig.from_pretrained(folder)
            loaded = peft.get_peft_model(other, config)
            keys = peft.set_peft_model_state_dict(loaded, peft.load_peft_weights(str(folder), device="cpu"))
            state = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
            rankwise.load_adapter(again, folder)
            rows.add(
                direction="rankwise to peft",
                case=case,
                model=name,
                kind=config.peft_type.value,
                layers=len(rankwise.core.adapted.adapted(model)),
                change=difference(model, build(name)),
                difference=difference(model, loaded),
                missing=sorted(set(state) & set(keys.missing_keys)),
                unexpected=list(keys.unexpected_keys),
                read_again=difference(model, again),
            )


def from_peft(rows: Rows, work: Path) -> None:
    """PEFT's, read by us, written by us, and read by PEFT again."""
    for name in ("llama", "gpt2", "llama untied", *MIXTURES):
        for case, config in theirs(name).items():
            if rows.has(direction="peft to rankwise", case=case, model=name):
                continue
            model, other, third = build(name), build(name), build(name)
            adapted = peft.get_peft_model(model, config)
            moved(adapted)
            folder = work / f"{name} {case} of peft"
            adapted.save_pretrained(folder)
            report = rankwise.load_adapter(other, folder)
            again = rankwise.save(other, work / f"{name} {case} again", format="peft")
            rows.add(
                direction="peft to rankwise",
                case=case,
                model=name,
                kind=config.peft_type.value,
                layers=len(report.rows),
                change=difference(adapted, build(name)),
                difference=difference(adapted, other),
                missing=report.totals["missing"],
                unexpected=report.totals["unexpected"],
                read_again=difference(adapted, peft.PeftModel.from_pretrained(third, again)),
            )


def pair(name: str) -> tuple[Any, Any]:
    """Two of PEFT's descriptions for one model: of two ranks and scales, and on other layers."""
    half, other = HALF[name], OTHER[name]
    poet = peft.LoraConfig(r=4, lora_alpha=6, target_modules=[half, other])
    return poet, peft.LoraConfig(r=2, lora_alpha=5, use_rslora=True, target_modules=[half])


CHOICES: dict[str, Any] = {  # what is in use here, and how PEFT comes to compute the same
    "several, the first": "poet",
    "several, the second": "coder",
    "several, none": None,
    "several, weighted sum as by cat": {"poet": 0.7, "coder": 0.3},
    "several, one for each row": ["poet", "coder", None, "poet"],
}


def chosen(model: Any, choice: Any) -> torch.Tensor:
    """The logits of PEFT's model with adapters as :func:`rankwise.use` chooses them."""
    with torch.no_grad():
        if choice is None:
            with model.disable_adapter():
                return model(ids()).logits
        if isinstance(choice, list):
            return model(ids(), adapter_names=["__base__" if each is None else each for each in choice]).logits
        if isinstance(choice, dict):
            model.base_model.add_weighted_adapter(list(choice), list(choice.values()), "sum", "cat")
        model.set_adapter("sum" if isinstance(choice, dict) else choice)
        return model(ids()).logits


def several(rows: Rows, work: Path) -> None:
    """Two of PEFT's adapters in one model on each side; what is in use here is written, and read by PEFT."""
    for name in ("llama", "gpt2"):
        if all(rows.has(direction="peft to rankwise", case=case, model=name) for case in CHOICES):
            continue
        poet, coder = pair(name)
        theirs = peft.get_peft_model(build(name), poet, "poet")
        theirs.add_adapter("coder", coder)
        for each in ("poet", "coder"):
            theirs.set_adapter(each)
            moved(theirs)
        theirs.eval().save_pretrained(work / f"{name} of two")
        model = build(name)
        with torch.no_grad():
            before = model(ids()).logits
        folders = [(each, work / f"{name} of two" / each) for each in ("poet", "coder")]
        totals = [rankwise.load_adapter(model, folder, name=each).totals for each, folder in folders]
        for case, choice in CHOICES.items():
            rankwise.use(model, choice)
            wanted = chosen(theirs, choice)
            with torch.no_grad():
                found = model.eval()(ids()).logits
            again = None
            if choice is not None and not isinstance(choice, list):
                folder = rankwise.save(model, work / f"{name} {case}", format="peft")
                read = peft.PeftModel.from_pretrained(build(name), folder)
                with torch.no_grad():
                    again = float((wanted - read.eval()(ids()).logits).abs().max())
            rows.add(
                direction="peft to rankwise",
                case=case,
                model=name,
                kind="LORA",
                layers=len(rankwise.core.adapted.adapted(model)),
                change=float((wanted - before).abs().max()),
                difference=float((wanted - found).abs().max()),
                missing=[key for total in totals for key in total["missing"]],
                unexpected=[key for total in totals for key in total["unexpected"]],
                read_again=again,
            )


def main() -> None:
    """Run all that is not in the result yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    rows = Rows(options.out)
    with tempfile.TemporaryDirectory() as work:
        to_peft(rows, Path(work))
        from_peft(rows, Path(work))
        several(rows, Path(work))
    wrong = [row for row in rows.rows if row["missing"] or row["unexpected"] or row["difference"] > 1e-5]
    print(f"{len(rows.rows)} cases, {len(wrong)} wrong, peft {peft.__version__}")


if __name__ == "__main__":
    main()
