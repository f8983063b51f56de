"""The folder of a compressed model with an adapter put into its stored numbers."""

import json
from dataclasses import dataclass
from pathlib import Path

from ..linalg import Metric
from ..models.absorption import absorb_adapters, adapted_sites
from ..models.adapted_weights import adapted_model
from ..models.model_files import save_model
from .adapted import AdaptedExporter
from .base import Source

ROWS = "rankwise_absorbed.json"


@dataclass(frozen=True, kw_only=True)
class Absorbed(AdaptedExporter):
    """A compressed folder with as many numbers as the one that was adapted, which rankwise and transformers load.

    Changes of factors go in exactly; of one beside a low-rank matrix the best of the old rank is kept, entry by
    entry. What is lost is in ``rankwise_absorbed.json``. Of a classifier's adapter it is the folder of the
    classifier, with its head and the names of its classes. The model is in memory meanwhile;
    :func:`rankwise.absorb` does the same with other measures of what is lost.

    Args:
        base: the model that was adapted: a folder, a hub id, or an embedded model.
    """

    def write(self, source: Source, out: Path) -> None:
        """Load, absorb and save.

        Raises:
            ValueError: if adapter and model do not belong together, or a matrix has no place for the change.
        """
        model, tokenizer = adapted_model(self.base, self.adapter(source))
        rows = absorb_adapters(model, adapted_sites(model), lambda name: (Metric(), Metric()))
        save_model(model, out, tokenizer)
        (out / ROWS).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
