"""llama.cpp opens what is exported, cuts texts as the tokenizer does, and computes what the model computes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from structures import (
    filled,
    gpt2,
    left_behind,
    low_bit_and_low_rank,
    low_rank,
    output,
    pivoted,
    quantized,
    sparse,
)
from tiny import llama
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import rankwise
from rankwise.compressors import Lord
from rankwise.core.surgery import structured
from rankwise.exporters import Gguf
from rankwise.exporters.ggml_blocks import low_bit, plain
from rankwise.exporters.ggml_tokenizer import LLAMA3, QWEN2
from rankwise.matrices import Quantized, Sum

TEXT = "The lazy dog's 2026 jumps, they'll see:\n\n  over 12345 fences;\tÄpfel, 日本 and <|end|>?! don't  WE'RE"
IDS = torch.tensor([[5, 300, 17, 42, 9, 260, 77, 31]])
EXACT = {"dtype": "f32", "low_bit": False}
SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPLITS = {
    "gpt-2": WORDS,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS]),
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "isolated"), BYTES]),
    "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES]),
}


def bpe(split: Any = WORDS, **changes: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens, trained on one line."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT.lower()] * 3,
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=letters, special_tokens=["<|end|>"]),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", **changes)


def model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {**SIZES, **HEADS, "initializer_range": 0.1}
    biases = {"attention_bias": True, "mlp_bias": True}
    factors = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    return {
        "llama": lambda: llama(**sizes),
        "llama with biases": lambda: llama(**sizes, **biases, tie_word_embeddings=False),
        "llama with large heads": lambda: llama(**sizes, head_dim=32),
        "llama linear": lambda: llama(
            **sizes, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
        ),
        "llama 3": lambda: llama(
            **sizes, rope_parameters={"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, **factors}
        ),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**sizes, head_dim=16, sliding_window=32)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**sizes)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16)),
    }[kind]().eval()


@pytest.fixture(scope="session")
def llama_cpp() -> Iterator[Any]:
    """The library; what it holds open for all its life is closed at the end of ours."""
    import llama_cpp

    yield llama_cpp
    llama_cpp._utils.outnull_file.close()
    llama_cpp._utils.errnull_file.close()


@pytest.fixture
def run(llama_cpp: Any) -> Iterator[Any]:
    """A function that opens a folder with llama.cpp, its cache of keys and values in float32."""
    opened = []

    def start(folder: Path, *, adapter: bool = False) -> Any:
        lora = {"lora_path": str(folder / "adapter.gguf")} if adapter else {}
        options = {"n_ctx": 64, "n_threads": 1, "logits_all": True, "verbose": False, "type_k": 0, "type_v": 0}
        opened.append(llama_cpp.Llama(str(folder / "model.gguf"), **options, **lora))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def logits(opened: Any, ids: Tensor) -> Tensor:
    opened.reset()
    opened.eval(ids[0].tolist())
    return torch.from_numpy(np.array(opened.scores[: ids.shape[1]]))


def greedy(opened: Any, ids: Tensor, count: int) -> list[int]:
    found = []
    for token in opened.generate(ids[0].tolist(), temp=0.0, repeat_penalty=1.0):
        found.append(int(token))
        if len(found) == count:
            return found
    raise AssertionError("llama.cpp stopped early")


def close(found: Tensor, wanted: Tensor, relative: float = 1e-4) -> None:
    assert float((found - wanted).abs().max()) <= relative * float(wanted.abs().max())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_none_are_named(value, tmp_path):
    small, layer = filled(model("llama"), quantized, low_bit_and_low_rank), "layers.1.self_attn"
    for name, tensor in small.state_dict().items():
        if layer in name and tensor.is_floating_point() and tensor.numel():
            tensor.view(-1)[0] = value
    for exporter in (Gguf(), Gguf(adapter=True), Gguf(low_bit=False)):
        with pytest.raises(ValueError, match=rf"{layer}.*_proj\.weight holds NaN or infinity"):
            rankwise.export(small, exporter, tmp_path / "out", tokenizer=bpe())
    assert not list(tmp_path.iterdir())


def test_what_older_files_hold_beside_the_weights_is_left_out(tmp_path, run):
    small = model("llama")
    small.save_pretrained(tmp_path / "dense")
    bpe().save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    beside = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    save_file(load_file(file) | beside, file, metadata={"format": "pt"})
    out = rankwise.export(tmp_path / "dense", Gguf(**EXACT), tmp_path / "out")
    close(logits(run(out), IDS), output(small, IDS)[0])


def test_a_folder_without_its_head_is_refused(tmp_path):
    llama(**SIZES, **HEADS, tie_word_embeddings=False).save_pretrained(tmp_path / "dense")
    bpe().save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head\.weight is not in the checkpoint"):
        rankwise.export(tmp_path / "dense", Gguf(**EXACT), tmp_path / "out")


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_biases_that_llama_cpp_does_not_read_are_refused(kind, tmp_path):
    small = model(kind)
    rankwise.compress(small, Lord(), keep=0.6, data=IDS, where=lambda name, _: "o_proj" in name)
    with pytest.raises(ValueError, match=rf"reads no .*o_proj\.bias in a {kind}.*adds no bias"):
        rankwise.export(small, Gguf(**EXACT), tmp_path / "out", tokenizer=bpe())
    biased = Qwen3Config(**SIZES, **HEADS, head_dim=16, attention_bias=True)
    with pytest.raises(ValueError, match=r"reads no .*k_proj\.bias in a qwen3"):
        rankwise.export(Qwen3ForCausalLM(biased), Gguf(**EXACT), tmp_path / "out", tokenizer=bpe())


def test_biases_from_compression_stay_where_llama_cpp_reads_them(run, tmp_path):
    small = model("llama")
    rankwise.compress(small, Lord(), keep=0.6, data=torch.arange(320).view(8, 40) % 300)
    assert all(layer.biased for layer in structured(small).values())
    opened = run(rankwise.export(small, Gguf(**EXACT), tmp_path / "out", tokenizer=bpe()))
    close(logits(opened, IDS), output(small, IDS)[0])


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "llama with biases",
        "llama with large heads",
        "llama linear",
        "llama 3",
        "mistral",
        "qwen2",
        "qwen3",
    ],
)
def test_llama_cpp_computes_the_same(kind, run, tmp_path):
    small = filled(model(kind), low_bit_and_low_rank, pivoted, low_rank, sparse)
    for name, parameter in small.named_parameters():
        if name.endswith("bias") or "norm" in name:
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    opened = run(rankwise.export(small, Gguf(**EXACT), tmp_path / "out", tokenizer=bpe()))
    close(logits(opened, IDS), output(small, IDS)[0])
    new = small.generate(IDS, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    assert greedy(opened, IDS, 8) == new[0, IDS.shape[1] :].tolist()
    trained = int(opened.metadata[f"{opened.metadata['general.architecture']}.context_length"])
    assert trained == (32 if kind == "mistral" else 64)  # the attention window, which llama.cpp leaves out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_llama_cpp_computes_what_a_narrower_model_does(kind, run, tmp_path):
    small, heads = model(kind), {"num_key_value_heads": [2, 1]}
    where = (lambda name, _: "mlp" in name) if kind == "qwen2" else None
    report = rankwise.narrow(small, keep=0.5, data=IDS, multiple_of=32, where=where)
    assert report.totals["widths"] == {"intermediate_size": [96, 32]} | ({} if kind == "qwen2" else heads)
    rankwise.save(small, tmp_path / "small", bpe())
    opened = run(rankwise.export(tmp_path / "small", Gguf(**EXACT), tmp_path / "out"))
    close(logits(opened, IDS), output(small, IDS)[0])


def test_heads_that_llama_cpp_would_not_read_are_refused(tmp_path):
    small = model("qwen2")
    rankwise.narrow(small, keep=0.5, data=IDS, where=lambda name, _: "attn" in name)
    with pytest.raises(ValueError, match="2 heads of 16 make the hidden size, 64"):
        rankwise.export(small, Gguf(), tmp_path / "out", tokenizer=bpe())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_shorter_types_are_near(dtype, run, tmp_path):
    small = filled(model("llama"), low_rank)
    opened = run(rankwise.export(small, Gguf(dtype=dtype), tmp_path / "out", tokenizer=bpe()))
    close(
        logits(opened, IDS), output(small, IDS)[0], 0.01 if dtype == "f16" else 0.1
    )  # 11 bits, 8 bits; the inputs are rounded too


@pytest.mark.parametrize("split", SPLITS)
def test_llama_cpp_cuts_texts_as_the_tokenizer_does(split, run, tmp_path):
    tokenizer = bpe(SPLITS[split])
    opened = run(rankwise.export(model("llama"), Gguf(), tmp_path / "out", tokenizer=tokenizer))
    for text in (TEXT, TEXT.lower(), " a", "\n\n\n 7"):
        ids = tokenizer(text)["input_ids"]
        assert opened.tokenize(text.encode(), special=True) == ids
        assert opened.detokenize(ids, special=True).decode() == text


def test_special_tokens_and_template_are_written(tmp_path):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer = bpe(chat_template=template)
    out = rankwise.export(model("llama"), Gguf(), tmp_path / "out", tokenizer=tokenizer)
    fields = GGUFReader(out / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == template
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert "tokenizer.ggml.bos_token_id" not in fields
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert kinds[tokenizer.eos_token_id] == 3  # control
    assert kinds[len(tokenizer) :] == [5] * (320 - len(tokenizer))  # unused


def test_all_of_several_templates_are_written(tmp_path):
    tokenizer = bpe(chat_template={"default": "{{ messages }}", "tool_use": "{{ tools }}"})
    out = rankwise.export(model("llama"), Gguf(), tmp_path / "out", tokenizer=tokenizer)
    fields = GGUFReader(out / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    assert fields["tokenizer.chat_template.tool_use"].contents() == "{{ tools }}"
    assert fields["tokenizer.chat_templates"].contents() == ["tool_use"]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_it_can_be_loaded_again(kind, tmp_path):
    small = filled(model(kind), low_rank, quantized)
    out = rankwise.export(small, Gguf(**EXACT), tmp_path / "out", tokenizer=bpe())
    other, _ = rankwise.load(out / "model.gguf")
    close(output(other, IDS), output(small, IDS))


def test_biases_that_transformers_would_not_read_are_named(tmp_path):
    out = rankwise.export(model("llama with biases"), Gguf(**EXACT), tmp_path / "out", tokenizer=bpe())
    with pytest.raises(ValueError, match=r"has biases, such as blk\.0.*from safetensors"):
        rankwise.load(out / "model.gguf")


def random_bits(bits: int, group: int, n: int = 128) -> Quantized:
    torch.manual_seed(bits)
    scale, offset = torch.rand(6, -(-n // group)).half().float(), torch.randn(6, -(-n // group)).half().float()
    return Quantized.from_codes(torch.randint(2**bits, (6, n)), scale, offset, bits=bits, group=group)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_blocks_hold_the_same_numbers(bits, group):
    matrix, rows = random_bits(bits, group), torch.randperm(6)
    stored = low_bit(matrix, rows)
    assert stored is not None
    assert stored.kind == ("Q5_1" if bits == 5 else "Q4_1")
    values = dequantize(stored.data, GGMLQuantizationType[stored.kind])
    torch.testing.assert_close(torch.from_numpy(values), matrix.dense().detach()[rows], rtol=1e-6, atol=1e-6)


def test_what_no_block_holds_exactly_is_written_out():
    assert low_bit(random_bits(6, 32)) is None
    assert low_bit(random_bits(4, 16)) is None
    assert low_bit(random_bits(4, 32, n=120)) is None
    matrix = random_bits(4, 32)
    matrix.scale.data[2, 1] = 1 / 3
    assert low_bit(matrix) is None


def test_low_bit_matrices_keep_their_integers(run, tmp_path):
    small = filled(model("llama").bfloat16(), quantized).float()
    outs = [rankwise.export(small, Gguf(low_bit=b), tmp_path / str(b), tokenizer=bpe()) for b in (True, False)]
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(outs[0] / "model.gguf").tensors}
    assert kinds["blk.1.attn_q.weight"] == kinds["blk.0.ffn_down.weight"] == "Q4_1"
    assert kinds["token_embd.weight"] == "F16"
    assert kinds["output_norm.weight"] == "F32"
    sizes = [(out / "model.gguf").stat().st_size for out in outs]
    assert sizes[0] < sizes[1]
    close(logits(run(outs[0]), IDS), output(small, IDS)[0], 0.1)  # llama.cpp rounds the inputs to 8 bits


def sparse_and_pivoted(m: int, n: int) -> Sum:
    return Sum(sparse(m, n), pivoted(m, n), low_rank(m, n))


@pytest.mark.parametrize("kind", [low_bit_and_low_rank, sparse_and_pivoted])
def test_low_rank_terms_become_an_adapter(kind, run, tmp_path):
    small = filled(model("llama"), kind, low_rank)
    out = rankwise.export(small, Gguf(**EXACT, adapter=True), tmp_path / "out", tokenizer=bpe())
    adapter = GGUFReader(out / "adapter.gguf")
    assert adapter.fields["adapter.lora.alpha"].contents() == 0.0
    assert {t.name for t in adapter.tensors} >= {"blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"}
    assert len(adapter.tensors) == 14  # of every second of 14 matrices
    wanted = output(small, IDS)[0]
    close(logits(run(out, adapter=True), IDS), wanted)
    assert float((logits(run(out), IDS) - wanted).abs().max()) > 0.01


def test_what_cannot_be_written_is_named(tmp_path):
    torch.manual_seed(0)
    small, huge = model("llama"), model("llama")
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    huge.get_submodule("model.layers.1.mlp.up_proj").get_parameter("weight").data[3, 4] = 1e6
    words = Tokenizer(models.WordLevel({"a": 0}))
    cases: list[tuple[str, nn.Module, Any, Gguf]] = [
        ("gpt2.*known are llama", gpt2(), bpe(), Gguf()),
        ("gelu", llama(**SIZES, hidden_act="gelu"), bpe(), Gguf()),
        ("no tokenizer", small, None, Gguf()),
        ("WordLevel.*byte-level BPE", small, PreTrainedTokenizerFast(tokenizer_object=words), Gguf()),
        ("Whitespace.*known are gpt-2", small, bpe(pre_tokenizers.Whitespace()), Gguf()),
        ("token 299.*64 rows", llama(), bpe(), Gguf()),
        ("layers.1.mlp.up_proj.weight: .* 1e[+]06 .*f16", huge, bpe(), Gguf()),
        ("nothing for an adapter", small, bpe(), Gguf(adapter=True)),
        (
            "yarn",
            llama(**SIZES, rope_parameters=yarn),
            bpe(),
            Gguf(),
        ),
    ]
    for message, module, tokenizer, to in cases:
        with pytest.raises(ValueError, match=message):
            rankwise.export(module, to, tmp_path / "out", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="dtype"):
        Gguf(dtype="q8")  # pyright: ignore[reportArgumentType]
    assert left_behind(tmp_path) == []
    assert plain(torch.tensor([torch.inf]), "f16").kind == "F16"  # what was infinite may stay so


def test_a_file_that_reads_back_wrong_is_refused(tmp_path, monkeypatch):
    import gguf

    real = gguf.GGUFWriter.write_tensor_data
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", lambda self, data: real(self, data ^ 1))
    with pytest.raises(ValueError, match="does not read back"):
        rankwise.export(model("llama"), Gguf(), tmp_path / "out", tokenizer=bpe())
    assert left_behind(tmp_path) == []


@pytest.mark.slow
def test_the_embedded_model_writes_the_same_text(run, tmp_path):
    network, tokenizer = rankwise.load("smollm2-135m", dtype=torch.float32)
    method = rankwise.compressors.PlainSvd()
    rankwise.compress(network, method, keep=0.97)
    out = rankwise.export(network, Gguf(**EXACT), tmp_path / "out", tokenizer=tokenizer)
    opened = run(out)
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    assert opened.tokenize(b"The capital of France is", add_bos=False) == ids[0].tolist()
    close(logits(opened, ids), output(network, ids)[0], 1e-3)
    new = network.generate(ids, max_new_tokens=24, min_new_tokens=24, do_sample=False)
    assert greedy(opened, ids, 24) == new[0, ids.shape[1] :].tolist()
