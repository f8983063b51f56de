"""An ordinary folder of transformers, written shard by shard."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from ..core.progress import track
from ..models.folded import Folded
from ..models.load import BESIDE
from ..models.model_files import read_back
from .base import Exporter, Source

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Dense(Exporter):
    """A folder that plain transformers loads without rankwise, every matrix written out.

    One shard of it is in memory at a time, never the model.

    Args:
        shard: largest size of a file of weights, in megabytes; a larger tensor has its own.
    """

    shard: int = 1000

    def __post_init__(self) -> None:
        if self.shard < 1:
            raise ValueError(f"shard must be >= 1 megabyte, got {self.shard}.")

    def write(self, source: Source, out: Path) -> None:
        """Fold a compressed folder.

        Raises:
            ValueError: if it is not compressed, or a layer got a bias that its architecture lacks.
        """
        from huggingface_hub import split_torch_state_dict_into_shards

        weights = Folded(source.folder())
        if not weights.layers:
            raise ValueError(f"{source.given} has no structured layer to fold; it is dense already.")
        for name, layer in weights.layers.items():
            if layer.biased:
                raise ValueError(
                    f"layer {name} got a bias from compression, for which an ordinary folder has no place; "
                    "compress with a method that adds none."
                )
        plan = split_torch_state_dict_into_shards(
            {name: weights.empty(name) for name in weights}, max_shard_size=self.shard * 10**6
        )
        for file, names in track(plan.filename_to_tensors.items(), "shards"):
            tensors = {name: weights[name].contiguous() for name in names}
            save_file(tensors, out / file, metadata={"format": "pt"})
            read_back(out / file, tensors)
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for pattern in BESIDE:
            for file in weights.folder.glob(pattern):
                if file.name not in ("config.json", INDEX):
                    shutil.copy(file, out)
        (out / "config.json").write_text(json.dumps(weights.config, indent=2) + "\n", encoding="utf-8")
