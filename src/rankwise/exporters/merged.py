"""An ordinary folder of transformers with an adapter put into the weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator

from ..models import load
from ..models.adapted_weights import AdaptedWeights
from ..models.exchange import outputs_of
from .adapted import AdaptedExporter, bytes_of
from .base import Source
from .shards import check_shard, copy_beside, write_shards


@dataclass(frozen=True, kw_only=True)
class Merged(AdaptedExporter):
    """A folder that plain transformers loads without rankwise, with the adapter put into the weights.

    Of a classifier's adapter it is the folder of the classifier, with its head and the names of its classes.
    Some lines of a matrix are made at a time, in float32, and rounded once to the type in which the model is
    stored. Matrices of a compressed model are written out.

    Args:
        base: the model that was adapted, compressed or not: a folder, a hub id, or an embedded model.
        memory: the most that making one tensor may take beside the adapter, such as 2GiB or 500MB; None needs
            little more than the largest tensor, and a float32 copy for adapters that do not just add something to
            a matrix.
        shard: largest size of a file of weights, in megabytes; a larger tensor has its own.
        compare: the largest model of tokens, in megabytes as stored, of which outputs are compared at the end;
            that takes two copies in float32. Of other models, and with 0, tensors alone are compared.
    """

    memory: str | None = None
    shard: int = 1000
    compare: int = 1000

    def __post_init__(self) -> None:
        bytes_of(self.memory)
        check_shard(self.shard)

    def write(self, source: Source, out: Path) -> None:
        """Merge tensor by tensor, and compare outputs where the model is small and takes tokens.

        Raises:
            ValueError: if adapter and model do not belong together, or the outputs differ.
        """
        weights = self.weights(source, self.memory)
        for name, layer in weights.layers.items():
            if layer.biased:
                raise ValueError(
                    f"layer {name} got a bias from compression, for which an ordinary folder has no place."
                )
        write_shards(weights, weights, out, self.shard)
        weights.finish()
        copy_beside(weights.folder, weights.config, out)
        weights.save_tokenizer(out)
        stored = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        if stored <= self.compare * 10**6 and weights.model.main_input_name == "input_ids":
            _compare(weights, out)


def _compare(weights: AdaptedWeights, out: Path) -> None:
    """Raise unless a merged model computes what the adapted one does, up to the rounding of its weights."""
    adapted = weights.load(torch.float32)
    merged: Any = load(out, dtype=torch.float32)[0]
    ids = torch.randint(
        adapted.config.get_text_config().vocab_size, (2, 16), generator=Generator().manual_seed(0)
    )
    kinds = [weights.empty(name).dtype for name in weights.names]
    limit = max(torch.finfo(kind).eps for kind in kinds) ** 0.5
    batch = {"input_ids": ids, **({"decoder_input_ids": ids} if adapted.config.is_encoder_decoder else {})}
    for one, other in zip(outputs_of(merged, batch, {}), outputs_of(adapted, batch, {}), strict=True):
        if not float((one - other).norm()) <= limit * float(other.norm()):
            error = float((one - other).norm() / other.norm())
            raise ValueError(
                f"the merged model computes something else than the adapted one, by {error:.2g} of it."
            )
