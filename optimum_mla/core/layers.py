"""The layers that a conversion covers, as users name them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from optimum_mla.core.errors import InvalidValueError

LAYER_PRESETS: dict[str, tuple[int, ...]] = {"x-ecomla-hybrid": (1, 3, 5, 7, 8, 10, 12, 14)}
"""Layers by the name of a preset. `x-ecomla-hybrid` has 8 of 16 layers (arXiv 2503.11132, hybrids of Llama-3.2-1B)."""

LayerChoice = str | int | Iterable[int]

_REMEDY = f"Give all, a list such as 0-7 or 1,3,5, or a preset ({', '.join(LAYER_PRESETS)})."


def parse_layers(layers: LayerChoice, count: int) -> tuple[int, ...]:
    """Return the indices of the chosen layers in rising order.

    Args:
        layers: `all`, the name of a preset, a list such as `0-3,8` (both ends included), or indices.
        count: Number of layers of the model.

    Raises:
        InvalidValueError: The choice is malformed or empty, or the model has fewer layers.
    """
    allowed = f"0 to {count - 1}"
    if not isinstance(layers, str):
        chosen = {layers} if isinstance(layers, int) else set(layers)
    elif layers == "all":
        chosen = set(range(count))
    elif layers in LAYER_PRESETS:
        chosen = set(LAYER_PRESETS[layers])
    else:
        chosen = set()
        for part in layers.replace(" ", "").split(","):
            match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
            if match is None:
                raise InvalidValueError("layers", layers, allowed, _REMEDY)
            first = int(match[1])
            # One beyond the last layer is refused below, so that no more need to be listed.
            chosen |= set(range(first, min(int(match[2] or first), max(first, count)) + 1))
    if not chosen or not all(type(layer) is int and 0 <= layer < count for layer in chosen):
        raise InvalidValueError("layers", layers, allowed, _REMEDY)
    return tuple(sorted(chosen))
