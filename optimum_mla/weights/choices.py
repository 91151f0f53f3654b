"""Choice of the library and the layers for the quantization of weights."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from optimum_mla.core.errors import InvalidValueError, UnsupportedModelError
from optimum_mla.core.suggestions import did_you_mean
from optimum_mla.models.family_table import family_of, is_converted
from optimum_mla.weights.library import WeightLibrary, make_library

FIELD = "weights"
CHOICES: dict[str, tuple[str, int]] = {
    "bnb-nf4": ("bitsandbytes", 4),
    "bnb-int8": ("bitsandbytes", 8),
    "hqq-int4": ("hqq", 4),
    "hqq-int8": ("hqq", 8),
    "quanto-int4": ("quanto", 4),
    "quanto-int8": ("quanto", 8),
}
"""Library and bits per code, by the name that users give."""
WEIGHT_CHOICES = ("none", *CHOICES)
UP_PROJECTIONS = ("kv_b_proj", "k_b_proj", "v_b_proj", "k_rope_proj")
"""Layers behind the cache, which are never quantized: see `quantize_weights`."""


def check_weights(choice: str) -> None:
    """Refuse a choice that does not exist or whose library is not installed.

    Raises:
        InvalidValueError: There is no such choice.
        MissingDependencyError: The library is not installed.
    """
    if choice not in WEIGHT_CHOICES:
        raise InvalidValueError(FIELD, choice, ", ".join(WEIGHT_CHOICES), did_you_mean(choice, WEIGHT_CHOICES))
    if choice != "none":
        make_library(CHOICES[choice][0])


def quantize_weights(model: PreTrainedModel, choice: str) -> PreTrainedModel:
    """Quantize the linear layers of a converted model, in place.

    The model is then saved and loaded like any other (`import optimum_mla`, `AutoModelForCausalLM.from_pretrained`),
    with the same logits. Its checkpoint is as small as the model, because weights are stored as packed codes with
    their scales.

    These parts are not quantized:
      - embeddings, `lm_head`, norms and biases;
      - the up-projections of the attention (`UP_PROJECTIONS`), whose weights decoding in latent space reads directly.
        With quantized ones it would have to expand the whole cache to keys and values at every token;
      - layers whose sizes the library cannot group (`unquantized_layers` returns their names).

    A scale belongs to 64 numbers of a row, or to a whole row for bnb-int8 and quanto-int8. bnb-int8 also rounds the
    inputs of the layers to 8 bits at each call.

    Args:
        model: A converted model. Quantized parameters cannot train, but adapters on them can.
        choice: One of `WEIGHT_CHOICES`; `none` leaves the model as it is.

    Returns:
        The same model.

    Raises:
        InvalidValueError: There is no such choice, or the weights are already quantized.
        UnsupportedModelError: The model is not converted, or the sizes of none of its layers fit.
        MissingDependencyError: The library is not installed.
    """
    check_weights(choice)
    if choice == "none":
        return model
    if not isinstance(model, PreTrainedModel) or not is_converted(model.config):
        raise UnsupportedModelError("model: it is not converted. Run optimum-cli mla-convert on it first.")
    if quantized_by(model.config) is not None:
        raise InvalidValueError(
            FIELD, choice, f"none, because the weights are already quantized ({quantized_by(model.config)})"
        )
    name, bits = CHOICES[choice]
    library = make_library(name)
    linears = _candidates(model)
    chosen = {path: linear for path, linear in linears.items() if library.fits(linear, bits)}
    if not chosen:
        raise UnsupportedModelError(f"model: no layer has the sizes that {choice} needs: {library.constraint(bits)}.")
    skipped = ["lm_head", *UP_PROJECTIONS, *(path for path in linears if path not in chosen)]
    _quantize(model, library, bits, chosen, skipped)
    return model


def _quantize(
    model: PreTrainedModel, library: WeightLibrary, bits: int, chosen: dict[str, nn.Linear], skipped: list[str]
) -> None:
    config = library.config(bits, skipped, model.dtype)
    for path, linear in chosen.items():
        quantized = library.quantized(linear, bits).requires_grad_(False)
        model.set_submodule(path, quantized.train(linear.training))
    # `from_pretrained` sets these on a quantized model, and `save_pretrained` reads them.
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.hf_quantizer.postprocess_model(model)


def _candidates(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the layers that may be quantized and are not yet, by name: those of decoder layers but up-projections."""
    spec = family_of(model.config).spec
    return {
        path: module
        for path, module in model.named_modules()
        if type(module) is nn.Linear
        and path.startswith(f"{spec.base}.{spec.layers}.")
        and path.rpartition(".")[2] not in UP_PROJECTIONS
    }


def unquantized_layers(model: PreTrainedModel) -> list[str]:
    """Return the names of the layers that `quantize_weights` did not quantize because their sizes do not fit."""
    return list(_candidates(model))


def quantized_by(config: Any) -> str | None:
    """Return the `quant_method` in a model's config, or None if its weights are not quantized."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    method = quantization["quant_method"] if isinstance(quantization, dict) else quantization.quant_method
    return str(getattr(method, "value", method))
