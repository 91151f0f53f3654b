"""The type of a model's rotary embedding, and its tables beyond those that the model itself asks for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Types of rotary embeddings whose frequencies do not depend on the length of the sequence."""


def rope_type(config: Any) -> str:
    """Return the type of a config's rotary embedding, such as `default` or `yarn`."""
    return str((getattr(config, "rope_parameters", None) or {}).get("rope_type", "default"))


def rotary_table(rotary: Callable[..., Any], like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin, [1 or B, T, D] each, at some positions, with the frequencies of the forward pass that runs.

    Embeddings whose frequencies depend on the length (`dynamic`, `longrope`) choose them when they are called, by the
    largest position at hand. The model calls its embedding once a pass; a further call for older tokens would choose
    again, and other frequencies. So this computes the table without the choice.

    Args:
        rotary: The model's rotary embedding.
        like: A tensor of the wanted dtype and device.
        positions: Positions [1 or B, T].
    """
    kind: Any = type(rotary)
    plain: Any = inspect.unwrap(kind.forward)
    return plain(rotary, like, positions)
