"""Which files of a folder are those of a model."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..core.files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BESIDE = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")  # what stands beside the weights


def weight_files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor of a model, of the files that transformers reads.

    Raises:
        ValueError: which says what is wrong with a folder in better words than transformers.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; give a folder that save_pretrained or rankwise wrote.")
    index = {} if (folder / SINGLE).is_file() else _index(folder)
    found = {}
    for file in [folder / name for name in sorted(set(index.values()) or {SINGLE})]:
        if not file.is_file():
            raise ValueError(f"{file} is missing; get it again.")
        try:
            with safe_open(file, framework="pt") as opened:
                found |= dict.fromkeys(opened.keys(), file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or cut short ({error}); get it again.") from error
    for name, file in index.items():
        if found.get(name) != folder / file:
            raise ValueError(f"{name} is not in {folder / file}, where {INDEX} has it; get both again.")
    return found


def _index(folder: Path) -> dict[str, str]:
    """Return the name of the file of each tensor, as the index of several files says it."""
    if not (folder / INDEX).is_file():
        if any(folder.glob("*.safetensors")):
            raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}; get the model again.")
        pickled = next(folder.glob("*.bin"), None)
        other = "" if pickled is None else f", and {pickled.name} is not unpickled; convert it to safetensors"
        raise ValueError(f"{folder} has no file of safetensors{other}.")
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{folder / INDEX} is damaged: its weight_map must name files; get it again.")
    return places


def files_beside(folder: Path) -> list[Path]:
    """Return what stands beside the weights of a model, but for its config and lists of files."""
    found = sorted(file for pattern in BESIDE for file in folder.glob(pattern))
    return [file for file in found if file.name != "config.json" and not file.name.endswith(".index.json")]
