"""The range of the codes of each channel."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from optimum_mla.codec.constants import constant
from optimum_mla.core.segments import ChannelBits


@lru_cache(maxsize=1024)
def zero_points(channels: ChannelBits) -> tuple[int, ...]:
    """Return 2^(b-1) for the bits b of each channel, by which its smallest code is below zero."""
    return tuple(2 ** (bits - 1) for bits, count in channels for _ in range(count))


@lru_cache(maxsize=1024)
def _largest(channels: ChannelBits) -> tuple[int, ...]:
    return tuple(half - 1 for half in zero_points(channels))


@lru_cache(maxsize=1024)
def _smallest(channels: ChannelBits) -> tuple[int, ...]:
    return tuple(-half for half in zero_points(channels))


def code_bounds(channels: ChannelBits, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest code of each channel, [r] each.

    Codes of b bits are from -2^(b-1) to 2^(b-1) - 1. Their middle is -1/2.

    Args:
        channels: Bits of the channels.
        like: A tensor whose dtype and device the result has.
    """
    return (
        constant(_smallest(channels), like.dtype, like.device),
        constant(_largest(channels), like.dtype, like.device),
    )
