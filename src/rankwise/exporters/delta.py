"""What an adapter changes in the weights of a model, written out."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..models.adapted_weights import AdaptedWeights
from .adapted import AdaptedExporter, bytes_of
from .base import Source
from .shards import check_shard, write_shards


@dataclass(frozen=True, kw_only=True)
class Delta(AdaptedExporter):
    """Files of safetensors with new minus old of each changed weight, in float32, under the weights' own names.

    This is what rules for merging take. Old is what the model computes with: of a compressed or low-bit matrix
    the value of its parts, not that rounded to the type of the files. Some lines of a tensor are made at a time.

    Args:
        base: the model that was adapted, compressed or not: a folder, a hub id, or an embedded model.
        memory: the most that making one tensor may take beside the adapter, such as 2GiB or 500MB; None needs
            little more than the largest tensor, and a float32 copy for adapters that do not just add something to
            a matrix.
        shard: largest size of a file, in megabytes; a larger tensor has its own.
    """

    memory: str | None = None
    shard: int = 1000

    def __post_init__(self) -> None:
        bytes_of(self.memory)
        check_shard(self.shard)

    def write(self, source: Source, out: Path) -> None:
        """Subtract tensor by tensor.

        Raises:
            ValueError: if adapter and model do not belong together.
        """
        weights = self.weights(source, self.memory)
        changes = _Changes(weights)
        write_shards(changes, changes, out, self.shard, "delta")
        weights.finish()


@dataclass(frozen=True)
class _Changes:
    weights: AdaptedWeights

    def __iter__(self) -> Iterator[str]:
        yield from (*self.weights.names, *self.weights.whole)

    def parts(self, name: str) -> Iterator[Tensor]:
        return self.weights.change(name)

    def empty(self, name: str) -> Tensor:
        return self.weights.empty(name).float()
