"""The context from which a converted model needs less memory than its source, added parameters included."""

from __future__ import annotations

import math


def break_even_tokens(added_bytes: float, saved_bytes_per_token: float) -> int | None:
    """Return how many tokens a cache must hold until what it saves is more than what the weights have grown by.

    One decoding step of one row reads all weights and the whole cache, so from this context on it also reads less
    memory than the source's does. That decides the speed wherever memory is the limit, as on GPUs.

    Args:
        added_bytes: Bytes of the weights that the conversion added; negative if it removed some.
        saved_bytes_per_token: Bytes per token that the cache is smaller than the source's.

    Returns:
        The number of tokens in all rows together; 0 if it is less from the first token on, and None if it never is.
    """
    if added_bytes <= 0:
        return 0
    return math.ceil(added_bytes / saved_bytes_per_token) if saved_bytes_per_token > 0 else None
