"""An ordinary folder of transformers, written shard by shard."""

from dataclasses import dataclass
from pathlib import Path

from ..models.folded import Folded
from .base import Exporter, Source
from .shards import check_shard, copy_beside, write_shards


@dataclass(frozen=True, kw_only=True)
class Dense(Exporter):
    """A folder that plain transformers loads without rankwise, every matrix written out.

    One tensor of it is in memory at a time, never the model.

    Args:
        shard: largest size of a file of weights, in megabytes; a larger tensor has its own.
    """

    shard: int = 1000

    def __post_init__(self) -> None:
        check_shard(self.shard)

    def write(self, source: Source, out: Path) -> None:
        """Fold a compressed folder.

        Raises:
            ValueError: if it is not compressed, or a layer got a bias that its architecture lacks.
        """
        weights = Folded(source.folder())
        if not weights.layers:
            raise ValueError(f"{source.given} has no structured layer to fold; it is dense already.")
        for name, layer in weights.layers.items():
            if layer.biased:
                raise ValueError(
                    f"layer {name} got a bias from compression, for which an ordinary folder has no place; "
                    "compress with a method that adds none."
                )
        write_shards(weights, weights, out, self.shard)
        copy_beside(weights.folder, weights.config, out)
