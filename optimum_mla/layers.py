"""Which layers a conversion covers."""

from __future__ import annotations

import re
from collections.abc import Iterable

from optimum_mla.errors import InvalidValueError

LAYER_PRESETS: dict[str, tuple[int, ...]] = {"x-ecomla-hybrid": (1, 3, 5, 7, 8, 10, 12, 14)}
"""Named choices. `x-ecomla-hybrid`: 8 of 16 layers (arXiv 2503.11132, hybrid models of Llama-3.2-1B)."""

LayerChoice = str | int | Iterable[int]

_REMEDY = f"Write all, a list such as 0-7 or 1,3,5, or a preset ({', '.join(LAYER_PRESETS)})."


def parse_layers(layers: LayerChoice, count: int) -> tuple[int, ...]:
    """Layer indices, rising.

    Args:
        layers: `all`, a preset's name, a list such as `0-3,8` (ends included), or indices.
        count: Layers that the model has.

    Raises:
        InvalidValueError: Malformed, empty, or beyond the model.
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
            chosen |= set(range(first, int(match[2] or first) + 1))
    if not chosen or not all(type(layer) is int and 0 <= layer < count for layer in chosen):
        raise InvalidValueError("layers", layers, allowed, _REMEDY)
    return tuple(sorted(chosen))
