"""What PEFT calls the task of a model of transformers, by which it chooses the class that loads the base."""

from collections.abc import Iterable

from torch import nn

HEADS = ("classifier", "score")  # PEFT trains a copy of each module whose name ends so, in these tasks:
CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS")


def task_of(model: nn.Module, saved: Iterable[str]) -> str | None:
    """Return the task of a model.

    Args:
        model: any.
        saved: paths of the modules that are written whole.

    Returns:
        None if PEFT has no name for it, or would expect other modules of a classifier than are written.
    """
    from transformers import PreTrainedModel
    from transformers.models.auto import modeling_auto as auto

    if not isinstance(model, PreTrainedModel):
        return None
    tasks = {
        "CAUSAL_LM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "SEQ_2_SEQ_LM": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "SEQ_CLS": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "TOKEN_CLS": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        "FEATURE_EXTRACTION": auto.MODEL_MAPPING_NAMES,
    }
    kind, name = model.config.model_type, type(model).__name__
    found = next((task for task, classes in tasks.items() if name in _several(classes.get(kind))), None)
    heads = {path for path, _ in model.named_modules() if path.endswith(HEADS)}
    return None if found in CLASSIFIERS and not heads <= set(saved) else found


def _several(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return names if isinstance(names, tuple) else (names or "",)
