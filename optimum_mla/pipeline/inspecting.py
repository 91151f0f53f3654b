"""The work of `mla-inspect`: predicting conversions of a model from its config and the headers of its weight files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from optimum_mla.calibrate.text import window_length
from optimum_mla.calibrate.windows import windows_to_read
from optimum_mla.convert.codec import codable_layers
from optimum_mla.core.errors import MLAError, UnreadableModelError, first_line
from optimum_mla.core.geometry import MLAGeometry, ModelGeometry
from optimum_mla.core.number_checks import check_finite
from optimum_mla.families.project import SourceAttention
from optimum_mla.families.spec import AttentionSpec, sliding_window
from optimum_mla.methods.registry import transform_class
from optimum_mla.models.family_table import family_of, is_converted
from optimum_mla.models.layers import model_geometry
from optimum_mla.ops.rope_split import SCORED_SELECTIONS
from optimum_mla.ops.rotary import PairTable
from optimum_mla.pipeline.checkpoint import RESIDENT_BYTES, Checkpoint
from optimum_mla.pipeline.estimate import conversion_memory
from optimum_mla.pipeline.weight_headers import headers
from optimum_mla.plan.budget import RankBudget
from optimum_mla.report.break_even import break_even_tokens
from optimum_mla.report.engines import ENGINES, OWN, Engine, blockers, source_blockers
from optimum_mla.report.inspection import Choice, EngineChoice, Inspection
from optimum_mla.report.schema import ConversionReport
from optimum_mla.stack import rope_type

RATIOS = (0.5, 0.25, 0.125)
METHODS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("gqa2mla", {}, "kv_cache_budget"),
    ("gqa2mla", {}, "kv_cache_ratio"),
    ("gqa2mla", {"rope_cache": "cached"}, "kv_cache_ratio"),
    ("gqa2mla", {"positional": "full"}, "kv_cache_ratio"),
    ("mha2mla", {}, "kv_cache_ratio"),
    ("x-ecomla", {}, "kv_cache_ratio"),
)
"""The methods to show, with options that change what is cached, and the option that has the size.

All of them are planned with calibration data.
"""
CALIBRATION_WINDOWS = 128
"""Number of calibration windows of a conversion with default options."""
CODEC_ITEMSIZE = 4
"""Bytes of a number of a codec."""
SHARED_ITEMSIZE = 2
"""Bytes of a number in the caches and the weights that are compared, whatever the dtype of the checkpoint."""
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
    config, tensors = checkpoint.config, headers(checkpoint)
    kinds = [kind for kind, _ in tensors.values()]
    dtype = max(sorted(set(kinds)), key=kinds.count)
    parameters = sum(math.prod(shape) for _, shape in tensors.values())
    weight_bytes = sum(ITEM_BYTES.get(kind, 1) * math.prod(shape) for kind, shape in tensors.values())
    known = Inspection(
        model,
        str(config.model_type),
        "not convertible",
        None,
        parameters,
        weight_bytes,
        str(DTYPES.get(dtype, dtype)).removeprefix("torch."),
    )
    try:
        family = family_of(config)
        checkpoint.check_buildable()
        geometry = model_geometry(family.spec, config)
    except UnreadableModelError:
        raise
    except MLAError as error:
        return replace(known, reason=first_line(error))
    first = geometry.layers[0]
    windows = any(sliding_window(config, index) is not None for index in range(config.num_hidden_layers))
    rope = rope_type(config)
    known = replace(
        known,
        layers=config.num_hidden_layers,
        hidden_size=first.hidden_size,
        num_attention_heads=first.num_attention_heads,
        num_key_value_heads=first.num_key_value_heads,
        head_dim=first.head_dim,
        features=features(config, first, windows, rope),
        source_cache_bytes_per_token=geometry.source_cache_numbers * SHARED_ITEMSIZE,
        cache_bytes_per_token=geometry.cache_bytes(bits=8 * SHARED_ITEMSIZE),
    )
    if is_converted(config):
        engines = []
        for engine in ENGINES:
            why = [*other_layers(engine, family.spec), *blockers(engine, geometry.layers, rope, windows)]
            why = why or frequency_blockers(engine, model)
            options = "as it is" if engine is OWN else f"mla-export --format {engine.format}"
            engines.append(EngineChoice(engine.name, options, None, why))
        return replace(known, state="converted", engines=engines)
    if getattr(config, "quantization_config", None) is not None:
        said = "its weights are quantized; convert the unquantized model, or fit a codec by mla-convert --cache-budget"
        return replace(known, reason=said)
    choices = [
        choice(config, method, options, size, ratio, geometry) for method, options, size in METHODS for ratio in ratios
    ]
    return replace(
        known,
        state="convertible",
        choices=choices,
        engines=engine_choices(family.spec, geometry, rope, windows),
        conversion_memory_bytes=default_memory(config, weight_bytes),
    )


def frequency_blockers(engine: Engine, model: str) -> list[str]:
    """Return why an engine cannot run a converted model for its rotary frequencies; empty if it can.

    They are read from the report of the conversion. Without a report nothing is said of them.

    Args:
        engine: The engine.
        model: The model's folder.
    """
    path = Path(model) / ConversionReport.file_name
    if engine is OWN or not path.is_file():
        return []
    report = ConversionReport.read(path.parent)
    shared = report.options.get("shared_rope")
    if engine.format == "gguf" and shared != "regular":
        return ["rotary frequencies that do not follow from one base; convert with --shared-rope regular"]
    chosen = report.method == "gqa2mla" or report.options.get("rope_selection") in SCORED_SELECTIONS
    return ["rotary frequencies chosen layer by layer; convert with --shared-rope"] if chosen and not shared else []


def other_layers(engine: Engine, spec: AttentionSpec) -> list[str]:
    """Return why an engine cannot run the layers of a family, whatever their attention; empty if it can."""
    return [] if engine is OWN or spec.llama_block else [f"layers of {spec.model_type}, which are not those of Llama"]


def features(config: PreTrainedConfig, layer: MLAGeometry, windows: bool, rope: str) -> list[str]:
    """Return the names of a model's features that matter to a conversion.

    Args:
        config: The model's config.
        layer: Shape of a layer.
        windows: Whether any layer has a sliding window.
        rope: The config's `rope_type`.
    """
    having = {
        "query biases": layer.query_bias,
        "key and value biases": layer.key_value_bias,
        "norms on queries and keys": layer.key_norm,
        "sliding windows": windows,
        f"{rope} rotary scaling": rope != "default",
        "tied embeddings": bool(getattr(config, "tie_word_embeddings", False)),
    }
    return [name for name, has in having.items() if has]


def planned(config: PreTrainedConfig, method: str, options: dict[str, Any]) -> list[ModelGeometry]:
    """Return the shapes from which a calibrated conversion would choose, without reading weights.

    Each returned shape is one of the whole model, in which all layers take the same choice. A conversion chooses for
    each layer separately.

    Args:
        config: The config of the source model.
        method: Name of the method.
        options: Options of the method.

    Raises:
        MLAError: The options do not fit the model.
    """
    family = family_of(config)
    transformation = transform_class(method)(calibration=torch.zeros(1, 2, dtype=torch.long), **options)
    covered = transformation.covered_layers(config)
    layers: list[list[MLAGeometry]] = []
    kept: dict[int, MLAGeometry] = {}
    for index, layer in enumerate(config.per_layer_config):
        geometry = family.spec.geometry(layer)
        if index not in covered:
            kept[index] = geometry
            continue
        source = SourceAttention(family.spec, nn.Module(), geometry, PairTable(geometry.head_dim), torch.empty(0))
        weightless = transformation.without_weights()
        shapes = weightless.candidates(source, weightless.plan_layer(source))
        layers.append(shapes)
    found = []
    for choice_of_all in zip(*layers, strict=True):
        chosen = dict(zip(covered, choice_of_all, strict=True)) | kept
        found.append(ModelGeometry(tuple(chosen[index] for index in sorted(chosen))))
    return found


def spelled(method: str, options: dict[str, Any]) -> str:
    """Return a method and its options as they are typed on the command line."""
    return " ".join([method, *(f"--{name.replace('_', '-')} {value}" for name, value in options.items())])


def choice(
    config: PreTrainedConfig,
    method: str,
    options: dict[str, Any],
    size: str,
    ratio: float,
    source: ModelGeometry,
) -> Choice:
    """Return what a method with a given size of the cache would give, or why it cannot have that size.

    Args:
        config: The config of the source model.
        method: Name of the method.
        options: Options of the method, without the size.
        size: Name of the option that has the size.
        ratio: Size of the cache relative to the source model's.
        source: Shape of the source model.
    """
    name = spelled(method, options) + (", coded" if size == "kv_cache_budget" else "")
    if size == "kv_cache_budget":
        return coded_choice(config, name, ratio, source)
    try:
        shapes = planned(config, method, {**options, size: ratio})
    except MLAError as error:
        return Choice(name, ratio, problem=first_line(error))
    numbers = max(shape.cache_numbers for shape in shapes)
    cached = max(shape.cache_bytes(bits=8 * SHARED_ITEMSIZE) for shape in shapes)
    before = source.cache_numbers * SHARED_ITEMSIZE
    added = [shape.parameters_added for shape in shapes]
    return Choice(
        name,
        ratio,
        numbers,
        cached,
        100 * cached / before,
        min(added),
        max(added),
        break_even_tokens(max(added) * SHARED_ITEMSIZE, int(before - cached)),
    )


def coded_choice(config: PreTrainedConfig, name: str, budget: float, source: ModelGeometry) -> Choice:
    """Return what a budget of bytes would give, or why the cache cannot be coded.

    Args:
        config: The config of the source model.
        name: What the choice is called.
        budget: Bytes of an old token's codes, as a share of its keys and values in 16 bits.
        source: Shape of the source model.
    """
    try:
        RankBudget(kv_cache_budget=budget)
        coded = codable_layers(config)
    except MLAError as error:
        return Choice(name, budget, problem=first_line(error))
    widths = [source.layers[layer].source_cache_numbers for layer in coded]
    whole = source.cache_numbers * SHARED_ITEMSIZE
    cached = whole - (1 - budget) * sum(widths) * SHARED_ITEMSIZE
    # Calibration chooses how many channels share the bits: from few with 8 bits to all with few.
    least, most = (sum(2 * width * int(share * width) for width in widths) for share in (2 * budget, 1))
    codec_bytes = most * CODEC_ITEMSIZE
    return Choice(
        name,
        budget,
        None,
        cached,
        100 * cached / whole,
        least,
        most,
        break_even_tokens(codec_bytes, int(whole - cached)),
    )


def engine_choices(spec: AttentionSpec, source: ModelGeometry, rope: str, windows: bool) -> list[EngineChoice]:
    """Return, for each inference engine, the conversion of a model that it can run, or why it can run none.

    Args:
        spec: The model's family.
        source: Shape of the source model.
        rope: The config's `rope_type`.
        windows: Whether any layer has a sliding window.
    """
    first, found = source.layers[0], []
    for engine in ENGINES:
        why = [*other_layers(engine, spec), *source_blockers(engine, first, rope, windows)]
        if engine.kv_lora_ranks is None or engine.qk_rope_head_dim is None:
            options = "any" if engine is OWN else f"gqa2mla or x-ecomla --export-format {engine.format}"
            found.append(EngineChoice(engine.name, options, None, why))
            continue
        wide, rotary = 2 * first.num_key_value_heads * first.head_dim, engine.qk_rope_head_dim
        fitting = [rank for rank in engine.kv_lora_ranks if rank + rotary <= wide]
        if not fitting and not why:
            why = [f"its latent of {min(engine.kv_lora_ranks)} + {rotary} is larger than the source's {wide} numbers"]
        rank = max(fitting, default=min(engine.kv_lora_ranks))
        options = f"gqa2mla --export-format {engine.format} --latent-norm"
        options += f" --kv-lora-rank {rank} --qk-rope-head-dim {rotary}"
        found.append(EngineChoice(engine.name, options, 100 * (rank + rotary) / wide, why))
    return found


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
