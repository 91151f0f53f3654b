"""Prediction of the bytes of a latent cache from the shapes of the layers and the settings."""

from __future__ import annotations

import math

from optimum_mla.cache.backends import make_backend
from optimum_mla.cache.settings import FULL_BITS, CacheSettings
from optimum_mla.cache.stored import SPARE_TOKENS, balanced_group
from optimum_mla.core.geometry import MLAGeometry

PARAMETER_BITS = 16
"""Bits of a scale, and of a shift."""


def predicted_bytes(
    geometry: MLAGeometry, settings: CacheSettings, tokens: int, itemsize: int, steps: int = 0
) -> float:
    """Return the bytes of one converted layer's cache for one row of the batch.

    A real cache may be larger by up to `spare_bytes`, because it takes room ahead of the tokens that it is given one by
    one.

    Args:
        geometry: Shape of the layer.
        settings: Settings of how its tokens are stored.
        tokens: Number of tokens in the cache.
        itemsize: Bytes of a number in the model's dtype.
        steps: Number of those tokens that came one by one after the prompt.
    """
    window = settings.window_tokens(tokens - steps, steps)
    old = sum(_part_bits(part.width, settings.bits_of(part), settings, itemsize) for part in geometry.cached_parts)
    return window * geometry.cache_numbers * itemsize + (tokens - window) * old / 8


def spare_bytes(geometry: MLAGeometry, itemsize: int) -> int:
    """Return the bytes that one layer's cache may hold for tokens that are still to come, for one row of the batch.

    Args:
        geometry: Shape of the layer.
        itemsize: Bytes of a number in the model's dtype.
    """
    return SPARE_TOKENS * geometry.cache_numbers * itemsize


def _part_bits(width: int, bits: int, settings: CacheSettings, itemsize: int) -> float:
    """Return the bits of one token's part after it has left the window of unquantized tokens."""
    if bits == FULL_BITS or not width:
        return 8 * itemsize * width
    backend = make_backend(settings.backend, bits)
    group = balanced_group(width, settings.group_size)
    groups = math.ceil(width / group)
    return backend.packed_bits(groups * group) + groups * backend.parameters * PARAMETER_BITS
