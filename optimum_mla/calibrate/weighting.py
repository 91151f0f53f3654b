"""Weights of the errors of a layer's keys and values, which a calibrated factorization minimizes."""

from __future__ import annotations

from torch import Tensor

from optimum_mla.calibrate.moments import QueryMoments
from optimum_mla.calibrate.states import output_moments
from optimum_mla.models import SourceAttention

STOPPED_WEIGHT = 3.0
"""Weight of the damage of stopped rotations against the error of a factorization.

The factorization counts the errors of tokens as if they were independent, but what stopped rotations do to neighbouring
tokens is alike. The weight was fitted to the measured errors of all candidates in the layers of SmolLM2-135M at a
quarter of the cache.
"""


def key_moments(source: SourceAttention, moments: QueryMoments, rotating: bool = False) -> Tensor:
    """Return the second moments of the queries that read each key head, [G, D, D].

    With them, the error of a key gives the squared size of the error in the hidden state.

    Args:
        source: The layer's attention.
        moments: The moments of its queries.
        rotating: Whether the keys rotate, so that queries read them turned by the distance.
    """
    # The rotary embedding's attention factor multiplies queries and keys.
    scale = (source.geometry.head_dim**-0.5 * source.attention_scaling**2) ** 2
    grouped = (
        (moments.relative_queries if rotating else moments.queries)
        .unflatten(0, (source.geometry.num_key_value_heads, -1))
        .sum(1)
    )
    return grouped * (scale * moments.key_scale)[:, None, None]


def value_moments(source: SourceAttention) -> Tensor:
    """Return the sum of W_O,hᵀ W_O,h over the query heads h of each value head, [G, D, D]."""
    return output_moments(source).unflatten(0, (source.geometry.num_key_value_heads, -1)).sum(1)
