"""What the evaluation, the speed test and the sampler need of a causal language model."""

import contextlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ..core.statistics import Batch

LENGTH = 12  # tokens of a text, by which it is found out what a model sees
REMEMBERED = ("past_key_values", "cache_params")  # what families call what they keep of the past


def check_causal(model: nn.Module, window: int, instead: str) -> Any:
    """Return the model if it predicts next tokens within a window, else say what to do instead.

    Raises:
        ValueError: if it has no language-model head, or no positions for ``window`` tokens, or if it sees the
            tokens that it is to predict.
    """
    causal = check_head(model, window, instead)
    if sees_ahead(causal):
        raise ValueError(
            f"{type(model).__name__} sees the tokens that it is to predict (is_decoder in its config, if it has "
            f"that, it sees only those before); {instead}."
        )
    return causal


def check_head(model: nn.Module, window: int, instead: str) -> Any:
    """Return the model if it has a head that predicts next tokens, and positions; it may be without numbers.

    Raises:
        ValueError: if it has no language-model head, or no positions for ``window`` tokens.
    """
    from transformers import PreTrainedModel

    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not continues_texts(model):
        raise ValueError(f"{kind} is not a causal language model of transformers; {instead}.")
    _check_positions(model, window)
    return model


def sees_ahead(model: Any) -> bool:
    """Whether the logits of a token depend on later ones, as those of models that fill in gaps do.

    That is found out by running it on two texts that differ in their last token.
    """
    config = model.config.get_text_config()
    size = min(LENGTH, positions_of(model) or LENGTH)
    text = torch.randint(config.vocab_size, (1, size), generator=Generator().manual_seed(0))
    other = torch.cat([text[:, :-1], (text[:, -1:] + 1) % config.vocab_size], 1)
    with evaluating(model):
        logits = model(input_ids=torch.cat([text, other]).to(model.device)).logits.float()
    change = (logits[1] - logits[0]).norm(dim=-1)
    rounding = max(1e-4, torch.finfo(model.dtype).eps)
    return bool((change[:-1] > rounding * change[-1]).any())


def positions_of(model: Any) -> int | None:
    """How many positions a model of transformers has, None if any number."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions if positions is not None and positions > 0 else None  # XLNet has -1, for any number


def continues_texts(model: Any) -> bool:
    """Whether a model of transformers says that it predicts the next tokens of what it is given."""
    return model.can_generate() and not model.config.is_encoder_decoder


def check_tokens(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Raise if a model of transformers has no vector for a token, or for a position, of any batch.

    Other models, and batches of what is no token ids, are left alone.

    Raises:
        ValueError: with the window or the token that is too large.
    """
    transformers = sys.modules.get("transformers")  # not there where no model is one of its
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return
    for batch in batches:
        if (ids := _ids_of(batch)) is not None:
            check_vocabulary(model, ids, "the data")
            places = batch.get("position_ids") if isinstance(batch, Mapping) else None
            _check_positions(model, ids.shape[1] if places is None else int(places.max()) + 1)


def reads_tokens_alone(model: Any) -> bool:
    """Whether a model of transformers can be given token ids and nothing else."""
    return model.main_input_name == "input_ids" and not model.config.is_encoder_decoder


def check_vocabulary(model: Any, ids: Tensor, name: str) -> None:
    """Raise if a model has no embedding of a token.

    Raises:
        ValueError: if so; the message calls the text by ``name``.
    """
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # of models that read no tokens
        return
    size = getattr(table, "num_embeddings", None)
    if size is None or ids.numel() == 0:
        return
    size += getattr(table, "num_additional_embeddings", 0)  # as Idefics has
    least, most = map(int, ids.aminmax())
    if least < 0 or most >= size:
        raise ValueError(
            f"{name} has token {most if most >= size else least}, but the vocabulary has {size} entries; use the "
            "model's own tokenizer."
        )


def _check_positions(model: Any, window: int) -> None:
    positions = positions_of(model)
    if positions is not None and positions < window:
        raise ValueError(
            f"window {window} is longer than the {positions} positions of {type(model).__name__}; give at most "
            f"{positions}."
        )


def _ids_of(batch: Batch) -> Tensor | None:
    """Return the (b, t) token ids of a batch, if it has some."""
    if isinstance(batch, Mapping):
        ids = batch.get("input_ids")
    else:
        ids = batch if isinstance(batch, Tensor) else batch[0]
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        return None
    return ids if ids.numel() else None


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Turn dropout and gradients off, and dropout back on where it was."""
    training = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


class Continued:
    """A causal language model that is given texts bit by bit.

    What it keeps of the past is handed back to it. One that keeps nothing reads everything again each time, and
    so does RWKV: transformers mixes the texts of a batch up where it goes on from a state.

    Args:
        model: of transformers.
        past: an empty cache for keys and values, where the model keeps such; else it makes its own.
    """

    def __init__(self, model: Any, past: Any = None) -> None:
        known = inspect.signature(model.forward).parameters
        self.model = model
        self.keeps = next((name for name in REMEMBERED if name in known), None)
        self.past = past if self.keeps == REMEMBERED[0] else None
        self.last = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self.ids: Tensor | None = None

    def next(self, ids: Tensor) -> Tensor:
        """Feed (b, t) further ids; return the (b, k) logits of the token after them."""
        self.ids = ids if self.ids is None else torch.cat([self.ids, ids], dim=1)
        if self.keeps is None:
            return self.model(input_ids=self.ids, **self.last).logits[:, -1].float()
        output = self.model(input_ids=ids, use_cache=True, **{self.keeps: self.past}, **self.last)
        self.past = output.get(self.keeps)
        if self.past is None:  # after the first time: nothing is lost
            self.keeps = None
        return output.logits[:, -1].float()


def generate(model: nn.Module, tokenizer: Any, prompt: str, tokens: int = 40) -> str:
    """Continue a prompt with the likeliest tokens, up to the end-of-text token.

    Args:
        model: a causal language model.
        tokenizer: of transformers.
        prompt: what to continue.
        tokens: at most so many.

    Returns:
        the continuation alone.

    Raises:
        ValueError: if the model is not a causal language model, or the prompt is empty.
    """
    ids = torch.tensor([tokenizer(prompt, verbose=False)["input_ids"]], dtype=torch.long)
    if ids.numel() == 0:
        raise ValueError("prompt is empty; give a text to continue.")
    causal = check_causal(model, ids.shape[1] + tokens, "only such models continue a text")
    continued, new, step = Continued(causal), [], ids.to(causal.device)
    with evaluating(causal):
        while len(new) < tokens:
            step = continued.next(step).argmax(-1, keepdim=True)
            new.append(int(step))
            if new[-1] == tokenizer.eos_token_id:
                break
    return tokenizer.decode(new, skip_special_tokens=True)
