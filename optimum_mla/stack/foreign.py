"""Caches that an attention is handed: what it cannot use is refused before anything is written to it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache

from optimum_mla.core.errors import InvalidValueError

REMEDY = "Make one with the model's make_cache()."


def require_cache(cache: Any) -> None:
    """Refuse what is no Transformers cache, such as tuples of tensors or the paged cache of `generate_batch`.

    Raises:
        InvalidValueError: It is another kind of object.
    """
    if not isinstance(cache, Cache):
        raise InvalidValueError("cache", type(cache).__name__, "a Transformers Cache that can hold latents", REMEDY)


def check_cache(cache: Any, layer_idx: int, first: Tensor, second: Tensor) -> None:
    """Refuse a cache that holds something else than latents of this layer.

    Args:
        cache: What was given as a cache.
        layer_idx: The layer.
        first: The new tokens' first vectors, [B, 1, S, ·].
        second: Their second vectors, [B, 1, S, ·].

    Raises:
        InvalidValueError: It is no Transformers cache, or its layer holds tensors of another batch, of other heads or
            widths (keys and values of the source model, prefixes of adapters), or on another device.
    """
    require_cache(cache)
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    for name, new in (("keys", first), ("values", second)):
        held = getattr(layer, name, None)
        if not isinstance(held, Tensor) or held.ndim != 4 or not held.numel():
            continue
        found, wanted = _shape(held), _shape(new)
        if found != wanted:
            raise InvalidValueError(
                "cache",
                f"{name} of {found} in layer {layer_idx}",
                f"latents of {wanted}, as the new tokens have",
                REMEDY,
            )


def _shape(tensor: Tensor) -> str:
    batch, heads, _, width = tensor.shape
    return f"{batch} rows, {heads} heads, {width} numbers on {tensor.device}"
