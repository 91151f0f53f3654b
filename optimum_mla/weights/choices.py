"""The choices of `--weights`, and the config of Transformers' quantizer for each of them."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig

from optimum_mla.core.errors import InvalidValueError, MissingDependencyError, UnsupportedModelError
from optimum_mla.core.suggestions import did_you_mean
from optimum_mla.models.family_table import family_of, is_converted
from optimum_mla.nn.projections import UP_PROJECTIONS

logger = logging.getLogger(__name__)

FIELD = "weights"
WEIGHT_CHOICES = ("none", "bnb-nf4", "bnb-int8")
GROUP = 64
"""Numbers of a row that share a scale in bnb-nf4."""
ROWS = 32
"""Rows that bnb-nf4 packs together on CPUs with bfloat16 instructions, which refuse a remainder."""


def check_weights(choice: str) -> None:
    """Refuse a choice that does not exist or that bitsandbytes is missing for.

    Raises:
        InvalidValueError: There is no such choice.
        MissingDependencyError: bitsandbytes is not installed.
    """
    if choice not in WEIGHT_CHOICES:
        remedy = did_you_mean(choice, WEIGHT_CHOICES)
        if choice in ("hqq-int4", "hqq-int8", "quanto-int4", "quanto-int8"):
            instead = "bnb-nf4" if choice.endswith("4") else "bnb-int8"
            remedy = f"Take {instead}: Transformers cannot save and load weights of HQQ and Quanto."
        raise InvalidValueError(FIELD, choice, ", ".join(WEIGHT_CHOICES), remedy)
    if choice != "none" and find_spec("bitsandbytes") is None:
        raise MissingDependencyError("bitsandbytes", "bitsandbytes", "quantize weights")


def bitsandbytes_config(config: PreTrainedConfig, choice: str) -> BitsAndBytesConfig:
    """Return what `from_pretrained(quantization_config=...)` takes to quantize the weights of a converted model.

    `bnb-nf4` is NF4 in groups of 64 numbers (QLoRA, arXiv 2305.14314). `bnb-int8` is LLM.int8() with a scale for each
    row (arXiv 2208.07339), which also rounds the inputs of the layers to 8 bits at each call.

    These linear layers are left as they are, as embeddings, norms and biases are:
      - the language-model head;
      - the up-projections of the attention, whose weights decoding in latent space reads directly. With quantized ones
        it would have to expand the whole cache to keys and values at every token;
      - for bnb-nf4, layers that `fits_nf4` does not let pass. A warning names them.

    Args:
        config: The config of the converted model, whose `dtype` is that in which the layers compute.
        choice: `bnb-nf4` or `bnb-int8`.

    Raises:
        InvalidValueError: There is no such choice.
        UnsupportedModelError: The model is not converted, its weights are quantized already, or no layer is left.
        MissingDependencyError: bitsandbytes is not installed.
    """
    check_weights(choice)
    if choice == "none":
        raise InvalidValueError(FIELD, choice, " or ".join(WEIGHT_CHOICES[1:]))
    if not is_converted(config):
        raise UnsupportedModelError("model: it is not converted. Run optimum-cli mla-convert on it first.")
    if (method := quantized_by(config)) is not None:
        raise UnsupportedModelError(f"model: its weights are quantized already ({method}). Name the unquantized model.")
    family = family_of(config)
    spec = family.spec
    with torch.device("meta"):
        modules = family.model(config).named_modules()
    kept = (spec.head, *UP_PROJECTIONS)
    layers = {path: one for path, one in modules if type(one) is nn.Linear and path.rpartition(".")[2] not in kept}
    unfit = [] if choice == "bnb-int8" else [path for path, layer in layers.items() if not fits_nf4(layer)]
    if len(unfit) == len(layers):
        raise UnsupportedModelError(
            f"model: it has no layer that {choice} can quantize, which needs in_features divisible by {GROUP} "
            f"and out_features divisible by {ROWS}. Take bnb-int8."
        )
    if unfit:
        logger.warning(
            "warning: %s leaves %d layers as they are, whose in_features are not divisible by %d or whose out_features "
            "are not divisible by %d: %s.",
            choice,
            len(unfit),
            GROUP,
            ROWS,
            ", ".join(unfit),
        )
    skipped = [*kept, *unfit]
    if choice == "bnb-int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=config.dtype,
        llm_int8_skip_modules=skipped,
    )


def fits_nf4(layer: nn.Linear) -> bool:
    """Return whether bitsandbytes computes with a linear layer in nf4 on every device."""
    return layer.in_features % GROUP == layer.out_features % ROWS == 0


def quantized_by(config: Any) -> str | None:
    """Return the `quant_method` in a model's config, or None if its weights are not quantized."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    method = quantization["quant_method"] if isinstance(quantization, dict) else quantization.quant_method
    return str(getattr(method, "value", method))
