"""Checks of the model that every conversion makes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import GraphModule
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_mla.core.errors import CorruptWeightsError, InvalidValueError, UnsupportedModelError
from optimum_mla.models.family_table import Family, family_of
from optimum_mla.stack import is_offloaded


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


def check_convertible(model: Any, quantized: bool = False) -> Family:
    """Return the family of a source model or a traced one, after checking that it can be converted.

    Quantized weights are refused unless `quantized` allows them.

    Raises:
        UnsupportedModelError: The argument is not a causal language model of a known family, or its weights are
            quantized or on the meta device.
        CorruptWeightsError: A weight in memory is NaN or infinite. Offloaded ones are checked when they are read.
    """
    config = config_of(model)
    if getattr(config, "quantization_config", None) is not None and not quantized:
        raise UnsupportedModelError(
            "model: its weights are quantized. Convert the unquantized model, then quantize it."
        )
    family = family_of(config)
    if isinstance(model, PreTrainedModel) and not isinstance(model, family.source_model | family.model):  # type: ignore[operator]
        raise UnsupportedModelError(
            f"model: got {type(model).__name__}, allowed: {family.source_model.__name__}. Load it as a causal LM."
        )
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            if not parameter.is_meta:
                check_finite(name, parameter)
            elif not is_offloaded(module):
                raise UnsupportedModelError(f"model: {name} is on the meta device. Load the weights first.")
    return family


def check_finite(name: str, weight: Tensor) -> None:
    """Refuse a weight that is not finite.

    Raises:
        CorruptWeightsError: It is NaN or infinite somewhere.
    """
    if not weight.isfinite().all():
        raise CorruptWeightsError(f"model: {name} holds NaN or infinite values. Check the checkpoint.")


def converted_already(layer: int) -> InvalidValueError:
    """Return the error for a layer that is already converted."""
    remedy = "Give each method of a hybrid layers of its own."
    return InvalidValueError("layers", layer, "layers not yet converted", remedy)
