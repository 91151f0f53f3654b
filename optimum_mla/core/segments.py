"""Bits of the channels of coded latents, in segments of equal bits. Imports no torch."""

from __future__ import annotations

from typing import Any

from optimum_mla.core.errors import InvalidValueError

WIDTHS = (8, 6, 5, 4, 3, 2, 1)
"""Numbers of bits that the code of a channel may have."""
GRANULE = 8
"""Channels come in multiples of this number, so that codes of any width fill whole bytes."""

ChannelBits = tuple[tuple[int, int], ...]
"""Pairs of bits and of the number of channels that have them, with falling bits."""


def check_channel_bits(received: Any, field: str = "channel_bits") -> ChannelBits:
    """Return the bits of the channels as tuples, after checking them.

    Args:
        received: What a config or a caller gave.
        field: Its name, for the error message.

    Raises:
        InvalidValueError: They are no pairs of bits and multiples of `GRANULE`, with falling bits.
    """
    allowed = f"pairs of bits ({', '.join(map(str, WIDTHS))}, falling) and of channels in multiples of {GRANULE}"
    try:
        pairs = tuple((bits, count) for bits, count in received)
    except (TypeError, ValueError) as error:
        raise InvalidValueError(field, received, allowed) from error
    widths = [bits for bits, _ in pairs]
    if widths != sorted(set(widths), reverse=True) or not set(widths) <= set(WIDTHS):
        raise InvalidValueError(field, received, allowed)
    if any(not isinstance(count, int) or count < 1 or count % GRANULE for _, count in pairs):
        raise InvalidValueError(field, received, allowed)
    return pairs


def total_channels(channels: ChannelBits) -> int:
    """Return the number of channels."""
    return sum(count for _, count in channels)


def total_bits(channels: ChannelBits) -> int:
    """Return the bits of the codes of one token, which is a multiple of 8."""
    return sum(bits * count for bits, count in channels)


def segments(widths: list[int]) -> ChannelBits:
    """Return the pairs for the bits of all channels in their order, [r]; zeros are left out.

    Args:
        widths: Bits of each channel, falling.
    """
    return tuple((bits, widths.count(bits)) for bits in WIDTHS if bits in widths)
