"""Predicted bytes of caches, and the contexts and batches that fit a memory budget."""

from __future__ import annotations

import math
from typing import Any

from optimum_mla.cache import CacheSettings
from optimum_mla.cache.settings import named_cache
from optimum_mla.cache.sizes import predicted_bytes, spare_bytes
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.families.spec import sliding_window
from optimum_mla.models.family_table import family_of, is_converted
from optimum_mla.models.layers import model_geometry, quantizable_layers
from optimum_mla.report.rows import BudgetRow, MemoryRow

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
UNQUANTIZED = ("default", "16bit")
"""Names of the caches that a model has which is not converted, other than Transformers' quantized ones."""
BATCH_CONTEXT = 8192
"""Tokens per row that the largest batch is computed for."""


def layer_numbers(config: Any) -> list[int] | None:
    """Return how many numbers each layer caches per token, or None if the kind of attention is not known.

    Args:
        config: The config of a converted model, of one with latent attention of Transformers, or of a plain decoder.
    """
    if is_converted(config):
        return [layer.cache_numbers for layer in model_geometry(family_of(config).spec, config).layers]
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    if not layers or not heads:
        return None
    if getattr(config, "kv_lora_rank", None):
        return [config.kv_lora_rank + config.qk_rope_head_dim] * layers
    groups = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return [2 * groups * head_dim] * layers


def predicted_cache_bytes(
    config: Any, cache: str, tokens: int, itemsize: int, steps: int = 0
) -> tuple[float, float] | None:
    """Return the bytes of a cache for one row, and by how much a live cache may exceed them.

    Args:
        config: The config of the model.
        cache: Name of the cache.
        tokens: Number of tokens in the cache.
        itemsize: Bytes of a number in the dtype of the model.
        steps: Number of these tokens that came one at a time after the prompt.

    Returns:
        Both numbers of bytes, or None if the kind of attention is not known, or if the cache is a quantized one of
        Transformers.
    """
    numbers, converted = layer_numbers(config), is_converted(config)
    if numbers is None or (not converted and cache not in UNQUANTIZED):
        return None
    latent = quantizable_layers(family_of(config).spec, config) if converted else []
    settings = CacheSettings.from_dict({**(config.latent_cache or {}), **named_cache(cache)}) if converted else None
    total = spare = 0.0
    for index, count in enumerate(numbers):
        if settings is not None and index in latent:
            geometry = model_geometry(family_of(config).spec, config).layers[index]
            total += predicted_bytes(geometry, settings, tokens, itemsize, steps)
            spare += spare_bytes(geometry, itemsize)
            continue
        window = sliding_window(config, index)
        # A layer with a sliding window keeps a view of one token less than it has memory for.
        total += count * itemsize * (tokens if window is None else min(tokens, window))
    return total, spare


def parse_bytes(text: str, field: str = "memory_budget") -> int:
    """Return the bytes of a size such as `24GB`, `512MiB` or `1e9`.

    Raises:
        InvalidValueError: The text is not a size, or less than a byte.
    """
    words = text.strip().lower().removesuffix("b")
    number = words.rstrip("kmgti")
    unit = words[len(number) :]
    try:
        size = int(float(number) * UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise InvalidValueError(field, text, "a size in bytes, KB, MB, GB, KiB, MiB or GiB, such as 24GB")
    return size


def budget_rows(rows: list[MemoryRow], budget: int) -> list[BudgetRow]:
    """Return the contexts and batches that fit `budget` bytes, for every measured model and cache.

    The bytes of a cache are taken as a straight line through those at the shortest and at the longest measured context.
    """
    found = []
    measured = [row for row in rows if row.live_cache_bytes is not None]
    for role, cache in dict.fromkeys(row.key for row in measured):
        mine = [row for row in measured if row.key == (role, cache)]
        slope, fixed = _line(mine, "live_cache_bytes")
        weights = mine[0].weight_bytes or 0
        free = max(0, budget - weights)
        row_bytes = slope * BATCH_CONTEXT + fixed
        found.append(
            BudgetRow(
                role=role,
                cache=cache,
                cache_bytes_per_token=slope,
                cache_fixed_bytes=fixed,
                weight_bytes=weights,
                longest_context_tokens=max(0, math.floor((free - fixed) / slope)) if slope > 0 else 0,
                largest_batch=math.floor(free / row_bytes) if row_bytes > 0 else 0,
                batch_context_tokens=BATCH_CONTEXT,
                cache_bytes_per_token_in_16_bits=_line(mine, "live_cache_bytes_in_16_bits")[0],
            )
        )
    return found


def _line(rows: list[MemoryRow], field: str) -> tuple[float, float]:
    """Return the slope of a line through the bytes at the shortest and at the longest context, and its height at 0."""
    by_context = {row.context_tokens: (getattr(row, field) or 0) / row.batch_size for row in rows}
    short, long = min(by_context), max(by_context)
    slope = by_context[long] / long
    if short != long:
        slope = (by_context[long] - by_context[short]) / (long - short)
    return slope, max(0.0, by_context[long] - slope * long)
