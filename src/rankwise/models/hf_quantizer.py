"""The classes that transformers calls for the quantisation method ``rankwise``; importing this registers them."""

import re
from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..core.stacks import stacks
from .quantizer import FORMAT, METHOD, finish, install


@register_quantization_config(METHOD)
class RankwiseConfig(QuantizationConfigMixin):
    """What stands under ``quantization_config`` in the ``config.json`` of a compressed model.

    Args:
        matrices: what :func:`rankwise.models.quantizer.describe` returned.
        version: of this format.
        rankwise_version: that wrote the file.
        quant_method: always "rankwise".

    Raises:
        ValueError: if the format is a newer one.
    """

    def __init__(
        self,
        matrices: Any = None,
        version: Any = None,
        rankwise_version: str | None = None,
        quant_method: str = METHOD,
    ) -> None:
        if version != FORMAT:
            raise ValueError(
                f"the model has version {version!r} of the format, this rankwise reads {FORMAT}; update rankwise."
            )
        self.quant_method = quant_method  # pyright: ignore[reportAttributeAccessIssue] (an enum of known methods)
        self.version, self.rankwise_version, self.matrices = version, rankwise_version, matrices


@register_quantizer(METHOD)
class RankwiseQuantizer(HfQuantizer):
    """Puts structured layers in a model before its weights are loaded, and checks them afterwards."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config: Any = self.quantization_config
        self.sharing = install(model, config.matrices, model.dtype, f"{model.base_model_prefix}.")
        places = {f"^{re.escape(path)}$" for path, _ in stacks(model)}  # of the empty tensors that stand for them
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *places}
        return model

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """Leave an ordinary model that may be cast, trained and saved again, with its specs in its config."""
        finish(model, self.sharing)
        self.remove_quantization_config(model)
        model.config.quantization_config = self.quantization_config
        return model

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride] (base: no type)
        """Structured layers are ordinary tensors."""
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride] (base: no type)
        """Structured layers have gradients."""
        return True
