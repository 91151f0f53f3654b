"""Checks of the model that every conversion makes."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_mla.core.errors import CorruptWeightsError, InvalidValueError, UnsupportedModelError
from optimum_mla.models.registry import Family, family_of


def config_of(model: Any) -> PreTrainedConfig:
    """Return the config of a model or of a traced one.

    Raises:
        UnsupportedModelError: The argument is neither.
    """
    config = model.meta.get("config") if isinstance(model, GraphModule) else getattr(model, "config", None)
    if not isinstance(model, PreTrainedModel | GraphModule) or config is None:
        kind = type(model).__name__
        raise UnsupportedModelError(
            f"model: got {kind}, allowed: a Transformers causal LM, or optimum_mla.trace of one."
        )
    return config


def check_convertible(model: Any) -> Family:
    """Return the family of a model after checking that it can be converted.

    Raises:
        UnsupportedModelError: The argument is not a causal language model of a known family, its weights are quantized,
            or they are not all on one device.
        CorruptWeightsError: A weight is NaN or infinite.
    """
    config = config_of(model)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            "model: its weights are quantized. Convert the unquantized model, then quantize it."
        )
    family = family_of(config)
    if isinstance(model, PreTrainedModel) and not isinstance(model, family.source_model | family.model):  # type: ignore[operator]
        raise UnsupportedModelError(
            f"model: got {type(model).__name__}, allowed: {family.source_model.__name__}. Load it as a causal LM."
        )
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise UnsupportedModelError("model: it is spread or offloaded by a device_map. Load it onto one device.")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UnsupportedModelError(f"model: {name} is on the meta device. Load the weights first.")
        if not parameter.isfinite().all():
            raise CorruptWeightsError(f"model: {name} holds NaN or infinite values. Check the checkpoint.")
    return family


def converted_already(layer: int) -> InvalidValueError:
    """Return the error for a layer that is already converted."""
    remedy = "Give each method of a hybrid layers of its own."
    return InvalidValueError("layers", layer, "layers not yet converted", remedy)
