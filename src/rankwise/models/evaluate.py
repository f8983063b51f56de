"""How good a language model is: perplexity on named texts, and distance to the model it was made from."""

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.memory import peak_memory_bytes
from ..core.progress import track
from ..core.report import Report
from ..core.stacks import stacks_of
from ..core.surgery import StructuredLinear
from ..core.views import EmbeddingView, view_of
from ..matrices import StructuredMatrix
from .causal import check_causal, check_vocabulary, evaluating
from .texts import tokens as tokens_of
from .texts import windows

_ROWS = 256  # tokens whose log-probabilities are in memory at a time


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, str | Tensor],
    *,
    window: int = 1024,
    dense: nn.Module | None = None,
    max_tokens: int | None = None,
) -> Report:
    """Measure a causal language model on named texts.

    Each text is cut into windows of consecutive tokens, no special token is added, and every token of a window
    but its first is scored: perplexity = exp(mean of -log p(token | tokens before it in the window)).

    Args:
        model: of transformers.
        tokenizer: turns texts into token ids; not used, and may be None, where texts are ids already.
        texts: by name, text or (t,) token ids.
        window: how many tokens the model sees at once.
        dense: another model to compare with, usually the one before compression.
        max_tokens: take only the last so many tokens of each text.

    Returns:
        Report: a row for each text: ``name``, ``tokens`` (scored ones), ``perplexity``, ``nats`` (mean per token)
        and, with ``dense``, ``dense_perplexity`` and ``kl``, the mean of KL(dense || model) per token, in nats.
        Totals: ``params``, ``bytes``, ``macs_per_token`` (see :func:`sizes`), ``seconds``, ``peak_memory_bytes``.

    Raises:
        ValueError: if there is no text or an empty one, an argument is out of range, a model is not a
            causal language model, the vocabularies differ, or logits or a perplexity are not finite.
    """
    if not texts:
        raise ValueError("texts is empty; give at least one text to evaluate on.")
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"max_tokens must be >= 2, got {max_tokens}.")
    models = [model] if dense is None else [model, dense]
    models = [check_causal(one, window, "perplexity needs a model that predicts tokens") for one in models]
    pieces = {
        name: windows(_ids(name, text, tokenizer, max_tokens, models), window) for name, text in texts.items()
    }
    start = time.perf_counter()
    with evaluating(*models):
        rows = [_row(name, parts, *models) for name, parts in pieces.items()]
    totals = {
        "window": window,
        **sizes(model),
        "seconds": time.perf_counter() - start,
        "peak_memory_bytes": peak_memory_bytes(models[0].device),
    }
    return Report(
        f"{type(model).__name__} on {len(rows)} texts, windows of {window} tokens", rows, "texts", totals
    )


def sizes(model: nn.Module) -> dict[str, int]:
    """Count what a model stores and computes.

    Returns:
        ``params`` and ``bytes`` of all parameters and persistent buffers, shared ones once; and
        ``macs_per_token``, the multiply-adds of all matrices, heads included and shared ones wherever they stand,
        to process one token (one position, for convolutions); attention scores and lookups are not counted. Of
        a mixture all experts count, as if the token went through each.

    >>> sizes(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3)))
    {'params': 55, 'bytes': 220, 'macs_per_token': 12}
    """
    stored = {id(t): t for t in model.state_dict(keep_vars=True).values()}.values()
    matrices = {id(m): m for m in model.modules() if isinstance(m, StructuredMatrix)}
    inner = {id(part) for m in matrices.values() for part in m.modules() if part is not m}
    params = sum(t.numel() for t in stored)
    for key, matrix in matrices.items():
        if key not in inner:  # numbers may be packed, several to a stored one
            params += matrix.params - sum(t.numel() for t in matrix.state_dict().values())
    macs = 0
    for _, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, StructuredLinear):
            macs += 0 if isinstance(layer.view, EmbeddingView) else layer.matrix.macs
        elif view_of(layer) is not None:
            macs += layer.get_parameter("weight").numel()
        macs += sum(layer.get_parameter(stack).numel() for stack in stacks_of(layer))
    return {
        "params": params,
        "bytes": sum(t.numel() * t.element_size() for t in stored),
        "macs_per_token": macs,
    }


def _ids(name: str, text: str | Tensor, tokenizer: Any, max_tokens: int | None, models: list[Any]) -> Tensor:
    if isinstance(text, str):
        ids = tokens_of(tokenizer, text, limit=max_tokens, last=True, name=name)
    elif text.dim() != 1 or text.is_floating_point():
        raise TypeError(
            f'text "{name}" must be a string or (t,) token ids, got {text.dtype} {tuple(text.shape)}.'
        )
    else:
        ids = text if max_tokens is None else text[-max_tokens:]
    if len(ids) < 2:
        raise ValueError(f'text "{name}" is empty or has one token only; at least two are needed.')
    for model in models:
        check_vocabulary(model, ids, f'text "{name}"')
    return ids


def _row(name: str, parts: list[Tensor], model: Any, dense: Any = None) -> dict[str, Any]:
    count = sum(len(part) - 1 for part in parts)
    totals = torch.zeros(3, dtype=torch.float64)  # of -log p, of the dense model's, and of the divergence
    for part in track(parts, f"evaluating {name}"):
        for sums in _scores(name, part, model, dense):
            totals += sums
    nats, dense_nats, divergence = (totals / count).tolist()
    row = {"name": name, "tokens": count, "perplexity": _perplexity(name, nats), "nats": nats}
    return row if dense is None else {**row, "dense_perplexity": _perplexity(name, dense_nats), "kl": divergence}


def _perplexity(name: str, nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError as error:
        raise ValueError(
            f'text "{name}": a loss of {nats:.4g} nats per token has no finite perplexity; the model is broken.'
        ) from error


def _scores(name: str, ids: Tensor, model: Any, dense: Any) -> Iterator[Tensor]:
    """Yield the three sums of :func:`_row` over a few tokens at a time."""
    logits = _logits(ids, model)
    other = None if dense is None else _logits(ids, dense).to(logits.device)
    if other is not None and other.shape != logits.shape:
        raise ValueError(
            f"dense has a vocabulary of {other.shape[-1]} entries and the model one of {logits.shape[-1]}; "
            "only models of the same vocabulary can be compared."
        )
    for low in range(0, len(ids) - 1, _ROWS):
        rows = slice(low, min(low + _ROWS, len(ids) - 1))
        target = ids[1:][rows].to(logits.device)
        ours = logits[rows].float().log_softmax(-1)
        sums = [_nats(name, ours, target, model)]
        if other is not None:
            theirs = other[rows].float().log_softmax(-1)
            sums.append(_nats(name, theirs, target, dense))
            divergence = functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
            sums.append(_finite(name, divergence.double().sum(), model))
        yield torch.stack(sums + [sums[0].new_zeros(())] * (3 - len(sums))).cpu()


def _nats(name: str, log_probabilities: Tensor, target: Tensor, model: Any) -> Tensor:
    """Return the sum of -log p of the targets."""
    return _finite(name, functional.nll_loss(log_probabilities, target, reduction="none").double().sum(), model)


def _finite(name: str, total: Tensor, model: Any) -> Tensor:
    """Return a sum, or raise: a NaN or infinity among the logits that mattered makes it NaN or infinite."""
    if not bool(total.isfinite()):
        raise ValueError(
            f'text "{name}": the logits of {type(model).__name__} are not finite; '
            "check its weights, or use float32."
        )
    return total


def _logits(ids: Tensor, model: Any) -> Tensor:
    """Return the (t, vocabulary) logits after each token, in the model's type."""
    return model(input_ids=ids[None].to(model.device), use_cache=False).logits[0]
