"""How large a latent cache will be, from shapes and settings alone."""

from __future__ import annotations

import math

from optimum_mla.cache.backends import make_backend
from optimum_mla.cache.settings import FULL_BITS, CacheSettings
from optimum_mla.cache.stored import SPARE_TOKENS, balanced_group
from optimum_mla.geometry import MLAGeometry

PARAMETER_BITS = 16
"""Of a group's scale and shift."""


def predicted_bytes(
    geometry: MLAGeometry, settings: CacheSettings, tokens: int, itemsize: int, steps: int = 0
) -> float:
    """Bytes of one converted layer's cache for one row.

    Steps may add room for up to `SPARE_TOKENS` further tokens (`spare_bytes`).

    Args:
        geometry: Shape of the layer.
        settings: How its tokens are stored.
        tokens: In the cache.
        itemsize: Bytes of a number in the model's dtype.
        steps: How many of them came one by one, behind the prompt.
    """
    window = settings.window_tokens(tokens - steps, steps)
    first = geometry.kv_lora_rank or geometry.k_lora_rank
    plain = geometry.scale_numbers
    second = geometry.cache_numbers - first - plain
    second_bits = settings.bits if geometry.attention_form == "full" else settings.rope_bits
    old = _vector_bits(first, settings.bits, settings, itemsize) + _vector_bits(second, second_bits, settings, itemsize)
    old += 8 * itemsize * plain
    return window * geometry.cache_numbers * itemsize + (tokens - window) * old / 8


def spare_bytes(geometry: MLAGeometry, itemsize: int) -> int:
    """Bytes, for one row, by which one layer's cache may exceed what its tokens need: it grows ahead of them."""
    return SPARE_TOKENS * geometry.cache_numbers * itemsize


def _vector_bits(width: int, bits: int, settings: CacheSettings, itemsize: int) -> float:
    """Bits of one token's vector once it has left the window."""
    if bits == FULL_BITS or not width:
        return 8 * itemsize * width
    backend = make_backend(settings.backend, bits)
    group = balanced_group(width, settings.group_size)
    groups = math.ceil(width / group)
    return backend.packed_bits(groups * group) + groups * backend.parameters * PARAMETER_BITS
