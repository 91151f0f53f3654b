"""The answers of `mla-inspect` about methods: what each one would give at a size of the cache, without any weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from optimum_mla.convert.codec import codable_layers
from optimum_mla.core.errors import MLAError, first_line
from optimum_mla.core.geometry import MLAGeometry, ModelGeometry
from optimum_mla.families.project import SourceAttention
from optimum_mla.methods.registry import transform_class
from optimum_mla.models.family_table import family_of
from optimum_mla.ops.rotary import PairTable
from optimum_mla.plan.budget import RankBudget
from optimum_mla.report.break_even import break_even_tokens
from optimum_mla.report.inspection import Choice

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
CODEC_ITEMSIZE = 4
"""Bytes of a number of a codec."""
SHARED_ITEMSIZE = 2
"""Bytes of a number in the caches and the weights that are compared, whatever the dtype of the checkpoint."""


def choice(
    config: PreTrainedConfig, method: str, options: dict[str, Any], size: str, ratio: float, source: ModelGeometry
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
    name, before = spelled(method, options), source.cache_numbers * SHARED_ITEMSIZE
    try:
        if size == "kv_cache_budget":
            name += ", coded"
            numbers, itemsize = None, CODEC_ITEMSIZE
            cached, least, most = codec_sizes(config, ratio, source)
        else:
            shapes, itemsize = candidate_shapes(config, method, {**options, size: ratio}), SHARED_ITEMSIZE
            numbers = max(shape.cache_numbers for shape in shapes)
            cached = max(shape.cache_bytes(bits=8 * SHARED_ITEMSIZE) for shape in shapes)
            added = [shape.parameters_added for shape in shapes]
            least, most = min(added), max(added)
    except MLAError as error:
        return Choice(name, ratio, problem=first_line(error))
    pays = break_even_tokens(most * itemsize, int(before - cached))
    return Choice(name, ratio, numbers, cached, 100 * cached / before, least, most, pays)


def codec_sizes(config: PreTrainedConfig, budget: float, source: ModelGeometry) -> tuple[float, int, int]:
    """Return the bytes of a token in a cache with codes, and the least and the largest number of a codec's numbers.

    The budget is the bytes of an old token's codes, as a share of its keys and values in 16 bits.

    Raises:
        MLAError: The budget is not possible, or the cache cannot be coded.
    """
    RankBudget(kv_cache_budget=budget)
    widths = [source.layers[layer].source_cache_numbers for layer in codable_layers(config)]
    # Calibration chooses how many channels share the bits: from few with 8 bits to all with few.
    least, most = (sum(2 * width * int(share * width) for width in widths) for share in (2 * budget, 1))
    return source.cache_numbers * SHARED_ITEMSIZE - (1 - budget) * sum(widths) * SHARED_ITEMSIZE, least, most


def candidate_shapes(config: PreTrainedConfig, method: str, options: dict[str, Any]) -> list[ModelGeometry]:
    """Return the shapes from which a calibrated conversion would choose.

    Each returned shape is one of the whole model, in which all layers take the same choice. A conversion chooses for
    each layer separately.

    Raises:
        MLAError: The options do not fit the model.
    """
    family = family_of(config)
    transformation = transform_class(method)(calibration=torch.zeros(1, 2, dtype=torch.long), **options)
    weightless, covered = transformation.without_weights(), transformation.covered_layers(config)
    # A layer that is not converted has one shape, whatever the others choose.
    candidates: dict[int, list[MLAGeometry]] = {}
    for index, layer in enumerate(config.per_layer_config):
        geometry = family.spec.geometry(layer)
        candidates[index] = [geometry]
        if index in covered:
            source = SourceAttention(family.spec, nn.Module(), geometry, PairTable(geometry.head_dim), torch.empty(0))
            candidates[index] = weightless.candidates(source, weightless.plan_layer(source))
    count = max(len(shapes) for shapes in candidates.values())
    every = [shapes if index in covered else shapes * count for index, shapes in candidates.items()]
    return [ModelGeometry(tuple(layers)) for layers in zip(*every, strict=True)]


def spelled(method: str, options: dict[str, Any]) -> str:
    """Return a method and its options as they are typed on the command line."""
    return " ".join([method, *(f"--{name.replace('_', '-')} {value}" for name, value in options.items())])
