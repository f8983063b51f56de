"""Several folders of adapters as one: the weighted sum of what they change."""

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from ..core.views import View
from ..matrices import Base, Several, StructuredMatrix
from .adapter_folder import AdapterFolder


class SummedFolder(AdapterFolder):
    """Several folders as one, each counting so much; layers that only some of them adapt are changed by these.

    Args:
        parts: the folders with their weights.

    Raises:
        ValueError: if one holds parameters that it replaces, or modules behind layers, of which there is no sum.
    """

    def __init__(self, parts: Sequence[tuple[AdapterFolder, float]]) -> None:
        self.title = " + ".join(folder.title for folder, _ in parts)
        self._folders, self._weights = [folder for folder, _ in parts], [float(weight) for _, weight in parts]
        self._keys = {f"{f.title}: {key}": (f, key) for f in self._folders for key in f.tensors}
        self.tensors = {name: f.tensors[key] for name, (f, key) in self._keys.items()}
        self._held: list[set[str]] = []
        self.config, self.labels, self.missing, self.others, self._used = {}, (), [], [], set()
        for folder in self._folders:
            folder.missing, folder.others = self.missing, self.others  # what one notes, all do
            if folder.extended:
                raise ValueError(
                    f"{folder.title} has a module behind {folder.extended[0]}, which is no change of a weight: "
                    "there is no sum of it with others; use load_adapter."
                )
            if folder.whole:
                raise ValueError(
                    f"{folder.title} replaces parameters of the model, such as norms, biases or the head, of "
                    "which there is no sum; merge it alone."
                )

    def prepare(self, model: nn.Module) -> None:
        """Let each look."""
        for folder in self._folders:
            folder.prepare(model)

    @property
    def layers(self) -> list[str]:
        """Those of any."""
        return list(dict.fromkeys(name for folder in self._folders for name in folder.layers))

    def wanted(self, names: Iterable[str], head: str | None) -> list[str]:
        """Those of any, and remember whose they are."""
        names = list(names)
        self._held = [{*folder.layers, *folder.wanted(names, head)} for folder in self._folders]
        return list(dict.fromkeys(name for folder in self._folders for name in folder.wanted(names, head)))

    @property
    def whole(self) -> Mapping[str, str]:
        """None."""
        return {}

    def named(self, key: str) -> str:
        """As the folder that has it."""
        folder, own = self._keys[key]
        return folder.named(own)

    def matrix(self, name: str, base: StructuredMatrix, view: View) -> StructuredMatrix | None:
        """Sum the changes of those that have the layer."""
        members, weights = {}, {}
        for i, folder in enumerate(self._folders):
            if name in self._held[i] and (matrix := folder.matrix(name, base, view)) is not None:
                members[str(i)], weights[str(i)] = matrix, self._weights[i]
        return Several(Base(base), members, weights).expression if members else None

    @property
    def unexpected(self) -> list[str]:
        """Of any."""
        rest = {f"{folder.title}: {key}" for folder in self._folders for key in folder.unexpected}
        return sorted(rest - self._used)
