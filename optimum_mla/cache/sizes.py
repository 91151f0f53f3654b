"""Prediction of the bytes of a latent cache from the shapes of the layers and the settings."""

from __future__ import annotations

import math

from optimum_mla.cache.backends import make_backend
from optimum_mla.cache.settings import FULL_BITS, CacheSettings
from optimum_mla.cache.stored import SPARE_TOKENS, balanced_group
from optimum_mla.codec import code_bytes, total_channels
from optimum_mla.core.geometry import MLAGeometry

PARAMETER_BITS = 16
"""Bits of a scale, and of a shift."""
PLACE_BYTES = 8
"""Bytes of the row and the token of an exempt vector."""


def predicted_bytes(
    geometry: MLAGeometry, settings: CacheSettings, tokens: int, itemsize: int, steps: int = 0
) -> float:
    """Return the bytes of one converted layer's cache for one row of the batch.

    A real cache may be larger by up to `spare_bytes`, because it takes room ahead of the tokens that it is given one by
    one. Of coded latents, the first `sink_tokens` are counted as exempt, but not those that are found at run time.

    Args:
        geometry: Shape of the layer.
        settings: Settings of how its tokens are stored.
        tokens: Number of tokens in the cache.
        itemsize: Bytes of a number in the model's dtype.
        steps: Number of those tokens that came one by one after the prompt.
    """
    coded = geometry.channel_bits if settings.codes else ()
    window = 0 if coded else settings.window_tokens(tokens - steps, steps)
    first = geometry.kv_lora_rank or geometry.k_lora_rank
    coded_too = geometry.second_bits if coded else ()
    plain = 0 if coded and geometry.factor_bits else geometry.scale_numbers
    second = geometry.cache_numbers - first - plain
    second_bits = settings.bits if geometry.attention_form == "full" else settings.rope_bits
    old = 8 * code_bytes(coded) if coded else _vector_bits(first, settings.bits, settings, itemsize)
    if coded_too:
        old += 8 * code_bytes(coded_too)
    else:
        old += _vector_bits(second, second_bits, settings, itemsize)
    old += 8 * itemsize * plain
    exempt = min(tokens, geometry.sink_tokens) * exempt_token_bytes(geometry, itemsize) if coded else 0
    return window * geometry.cache_numbers * itemsize + (tokens - window) * old / 8 + exempt


def exempt_token_bytes(geometry: MLAGeometry, itemsize: int) -> int:
    """Return the bytes that a layer of codes holds for a token that is exempt in all of its coded tensors.

    Args:
        geometry: Shape of the layer.
        itemsize: Bytes of a number in the model's dtype.
    """
    codes = [channels for channels in (geometry.channel_bits, geometry.second_bits) if channels]
    return sum(total_channels(channels) * itemsize + PLACE_BYTES for channels in codes)


def spare_bytes(geometry: MLAGeometry, itemsize: int) -> int:
    """Return the bytes that one layer's cache may hold for tokens that are still to come, for one row of the batch.

    Args:
        geometry: Shape of the layer.
        itemsize: Bytes of a number in the model's dtype.
    """
    return SPARE_TOKENS * geometry.cache_numbers * itemsize


def _vector_bits(width: int, bits: int, settings: CacheSettings, itemsize: int) -> float:
    """Return the bits of one token's vector after it has left the window of unquantized tokens."""
    if bits == FULL_BITS or not width:
        return 8 * itemsize * width
    backend = make_backend(settings.backend, bits)
    group = balanced_group(width, settings.group_size)
    groups = math.ceil(width / group)
    return backend.packed_bits(groups * group) + groups * backend.parameters * PARAMETER_BITS
