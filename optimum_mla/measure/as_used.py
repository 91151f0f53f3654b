"""How far a model with a codec is from its teacher, each read through its own cache."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from transformers import DynamicCache

from optimum_mla.measure.quality import LARGEST_MEAN_LOSS, compare_decoding

READ_AT_ONCE = 32
"""Number of tokens that go through the caches at a time."""


def divergence_as_used(model: Any, teacher: Any, windows: Tensor) -> float:
    """Return the divergence of a model's predictions from its teacher's, as both are used, in nats.

    The second half of each window is read through the cache after the first one, by the teacher through its own.

    Args:
        model: A model with a codec, adapters around it or not.
        teacher: The teacher, which is read exactly, whether or not it has a codec too.
        windows: Token ids, [N, L].
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = compare_decoding(
        model,
        base.make_cache,
        windows,
        windows.shape[1] - windows.shape[1] // 2,
        teacher,
        lambda: DynamicCache(config=teacher.config),
        READ_AT_ONCE,
    )
    # Callers take the exponential.
    return math.inf if found.kl is None or found.kl > LARGEST_MEAN_LOSS else found.kl
