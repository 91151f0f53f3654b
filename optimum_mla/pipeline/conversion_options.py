"""The options of a method: the size that they leave open, and the transformation that they make."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from optimum_mla.calibrate.statistics_folder import CalibrationStatistics
from optimum_mla.convert.codec import codable_layers
from optimum_mla.convert.signature import whole_signature
from optimum_mla.convert.transformation import MLATransformation
from optimum_mla.core.errors import MLAError, OptionError
from optimum_mla.core.suggestions import did_you_mean
from optimum_mla.methods.registry import transform_class
from optimum_mla.models.wrappers import wrapper_of
from optimum_mla.pipeline.loading import TextOptions
from optimum_mla.plan.budget import DEFAULT_CACHE_BUDGET, DEFAULT_CACHE_RATIO


def default_size(
    config: PreTrainedConfig, method: str, options: dict[str, Any], texts: TextOptions, exported: bool
) -> dict[str, float]:
    """Return the option about the size of the cache where the user gave none.

    It is a budget of bytes where the cache can be coded and no option is about converted weights. Otherwise it is a
    share of the numbers. The config may be that of a wrapper around a language model.
    """
    about_weights = options.keys() - {"layers"}
    if not transform_class(method).has_codes or about_weights or exported or texts.uncalibrated:
        return {"kv_cache_ratio": DEFAULT_CACHE_RATIO}
    try:
        if wrapper_of(config) is None and codable_layers(config, options.get("layers", "all")):
            return {"kv_cache_budget": DEFAULT_CACHE_BUDGET}
    except MLAError:
        pass  # What is wrong with the model or the layers is found again, where weights are converted.
    return {"kv_cache_ratio": DEFAULT_CACHE_RATIO}


def check_calibration_is_used(transformation: MLATransformation, texts: TextOptions, method: str) -> None:
    """Refuse a lossy conversion whose options leave the calibration data unused, unless the user asked for that.

    Raises:
        OptionError: The calibration data would not be used.
    """
    if (texts.calibration_data is None and texts.statistics is None) or transformation.needs_calibration:
        return
    raise OptionError(
        f"{method} with the factorization {transformation.factorization} uses no calibration data, and its result is "
        "of no use until it is trained. Give --uncalibrated in their place if you will train it, or leave out "
        "--factorization."
    )


def build_transformation(
    method: str, options: dict[str, Any], calibration: Tensor | CalibrationStatistics | None
) -> MLATransformation:
    """Return the transformation of a method.

    Raises:
        InvalidValueError: There is no such method, or the method refuses the value of an option.
        OptionError: The method does not have one of the options.
    """
    cls = transform_class(method)
    known = option_names(cls)
    for name in options:
        if name not in known:
            hint = did_you_mean(name, known)
            raise OptionError(
                f"{method} has no --{name.replace('_', '-')} option. {hint}{' ' if hint else ''}"
                f"Its options, as they are named in Python, are: {', '.join(known)}."
            )
    return cls(calibration=calibration, **options)


def option_names(method: type[MLATransformation]) -> list[str]:
    """Return the keyword arguments of a method's class, with those that it passes on to its base classes."""
    return [name for name in whole_signature(method).parameters if name != "calibration"]
