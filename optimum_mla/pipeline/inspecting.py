"""`mla-inspect`: predict conversions of a model from its config and the headers of its weight files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from optimum_mla.calibrate.text import window_length
from optimum_mla.calibrate.windows import windows_to_read
from optimum_mla.core.errors import MLAError, UnreadableModelError, first_line
from optimum_mla.core.geometry import MLAGeometry
from optimum_mla.core.number_checks import check_finite
from optimum_mla.models.family_table import family_of, is_converted
from optimum_mla.models.layers import model_geometry
from optimum_mla.pipeline.checkpoint import RESIDENT_BYTES, Checkpoint
from optimum_mla.pipeline.engine_choices import converted_engines, has_windows, source_engines
from optimum_mla.pipeline.estimate import conversion_memory
from optimum_mla.pipeline.method_choices import METHODS, SHARED_ITEMSIZE, choice
from optimum_mla.pipeline.weight_headers import headers
from optimum_mla.report.inspection import Inspection
from optimum_mla.stack import rope_type

RATIOS = (0.5, 0.25, 0.125)
CALIBRATION_WINDOWS = 128
"""Number of calibration windows of a conversion with default options."""
ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def inspect(model: str, ratios: Sequence[float] = RATIOS, hub: dict[str, Any] | None = None) -> Inspection:
    """Return what conversions of a model would give, without loading its weights.

    Only the config and the headers of the safetensors files are read.

    Args:
        model: The model, as a hub id or a folder.
        ratios: Sizes of the cache to show, relative to the source model's, as for `kv_cache_ratio`.
        hub: Keyword arguments for loading: `revision`, `cache_dir`, `token` and `trust_remote_code`.

    Raises:
        InvalidValueError: A size is not a number above 0.
        UnsupportedModelError: There is no such model, or it has no safetensors files.
        UnreadableModelError: A file of the model is broken.
    """
    checkpoint = Checkpoint.of(model, hub)
    for ratio in ratios:
        check_finite("kv_cache_ratios", ratio, above=True)
    config, known = checkpoint.config, weights_of(checkpoint)
    try:
        family = family_of(config)
        checkpoint.check_buildable()
        geometry = model_geometry(family.spec, config)
    except UnreadableModelError:
        raise
    except MLAError as error:
        return replace(known, reason=first_line(error))
    first = geometry.layers[0]
    known = replace(
        known,
        layers=config.num_hidden_layers,
        hidden_size=first.hidden_size,
        num_attention_heads=first.num_attention_heads,
        num_key_value_heads=first.num_key_value_heads,
        head_dim=first.head_dim,
        features=features(config, first),
        source_cache_bytes_per_token=geometry.source_cache_numbers * SHARED_ITEMSIZE,
        cache_bytes_per_token=geometry.cache_bytes(bits=8 * SHARED_ITEMSIZE),
    )
    if is_converted(config):
        return replace(known, state="converted", engines=converted_engines(model, config, geometry))
    if getattr(config, "quantization_config", None) is not None:
        said = "its weights are quantized; convert the unquantized model, or fit a codec by mla-convert --cache-budget"
        return replace(known, reason=said)
    return replace(
        known,
        state="convertible",
        choices=[choice(config, *method, ratio, geometry) for method in METHODS for ratio in ratios],
        engines=source_engines(config, geometry),
        conversion_memory_bytes=default_memory(config, known.weight_bytes),
    )


def weights_of(checkpoint: Checkpoint) -> Inspection:
    """Return what the headers of a checkpoint's files say, as an inspection of a model that cannot be converted."""
    tensors = headers(checkpoint)
    kinds = [kind for kind, _ in tensors.values()]
    dtype = max(sorted(set(kinds)), key=kinds.count)
    return Inspection(
        model=checkpoint.location,
        model_type=str(checkpoint.config.model_type),
        state="not convertible",
        reason=None,
        parameters=sum(math.prod(shape) for _, shape in tensors.values()),
        weight_bytes=sum(ITEM_BYTES.get(kind, 1) * math.prod(shape) for kind, shape in tensors.values()),
        dtype=str(DTYPES.get(dtype, dtype)).removeprefix("torch."),
    )


def features(config: PreTrainedConfig, layer: MLAGeometry) -> list[str]:
    """Return the names of a model's features that matter to a conversion; `layer` is the shape of one of its layers."""
    rope = rope_type(config)
    having = {
        "query biases": layer.query_bias,
        "key and value biases": layer.key_value_bias,
        "norms on queries and keys": layer.key_norm,
        "sliding windows": has_windows(config),
        f"{rope} rotary scaling": rope != "default",
        "tied embeddings": bool(getattr(config, "tie_word_embeddings", False)),
    }
    return [name for name, has in having.items() if has]


def default_memory(config: PreTrainedConfig, weight_bytes: int) -> int:
    """Return an estimate of the highest memory, in bytes, of a conversion of the weights with default options.

    Args:
        config: The config of the source model.
        weight_bytes: Bytes of its weights.
    """
    length = window_length(config, None, "calibration_length")
    evaluated = (windows_to_read(CALIBRATION_WINDOWS) - CALIBRATION_WINDOWS) * length
    return conversion_memory(
        config, weight_bytes, CALIBRATION_WINDOWS * length, evaluated, offloaded=weight_bytes > RESIDENT_BYTES
    )
