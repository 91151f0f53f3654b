"""The layout of the codes of one layer: bits of the channels and gains of groups of them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optimum_mla.core.errors import InvalidValueError
from optimum_mla.core.segments import GRANULE, ChannelBits, check_channel_bits, total_bits, total_channels

GAIN_BITS = 3
"""Bits of a gain."""
GAIN_OCTAVES = 0.5
"""Octaves between two neighbouring gains."""
GAIN_GROUPS = 8
"""Number of groups of channels that have a gain of their own in each token."""


@dataclass(frozen=True)
class Layout:
    """How the vectors that a layer caches are stored as codes.

    A channel of b bits has codes k from -2^(b-1) to 2^(b-1) - 1. In each token every group of neighbouring channels has
    a gain g = 2^(j/2), whose index j is a code of three bits. The codes stand for g·(k + 1/2), in units of the
    channel's step.

    Attributes:
        channels: Pairs of bits and of the number of channels that have them, with falling bits.
        gain_groups: Number of groups that have gains, which is 0 or a multiple of `GRANULE`. Each group has the same
            number of channels up to one.

    Raises:
        InvalidValueError: The bits or the number of groups is none of these.
    """

    channels: ChannelBits
    gain_groups: int = GAIN_GROUPS

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", check_channel_bits(self.channels))
        groups = self.gain_groups
        if not isinstance(groups, int) or groups < 0 or groups % GRANULE or groups > self.num_channels:
            allowed = f"0, or a multiple of {GRANULE} up to {self.num_channels}, the number of channels"
            raise InvalidValueError("gain_groups", groups, allowed)

    @property
    def num_channels(self) -> int:
        """Return the number of channels that have bits."""
        return total_channels(self.channels)

    @property
    def stored(self) -> ChannelBits:
        """Return the bits of all codes of a token in the order in which they are packed: channels, then gains."""
        return (*self.channels, (GAIN_BITS, self.gain_groups)) if self.gain_groups else self.channels

    @property
    def bytes_per_token(self) -> int:
        """Return the bytes of one token's codes, gains included."""
        return total_bits(self.stored) // 8

    @property
    def groups(self) -> tuple[int, ...]:
        """Return the group of each channel, [r]."""
        return groups_of(self.num_channels, self.gain_groups)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Layout:
        """Return the layout of which `dataclasses.asdict`, or JSON, made a dictionary."""
        return cls(fields["channels"], fields["gain_groups"])


def groups_of(channels: int, groups: int) -> tuple[int, ...]:
    """Return the group of each of a number of channels in groups of neighbours, which are of one size up to one."""
    return tuple(channel * groups // channels for channel in range(channels))
