"""Integer codes with a fixed number of bits in each channel, and what is fitted to make them."""

from optimum_mla.codec.codes import code_bounds
from optimum_mla.codec.packing import code_bytes, pack, unpack
from optimum_mla.core.segments import GRANULE, WIDTHS, ChannelBits, check_channel_bits, total_bits, total_channels

__all__ = [
    "GRANULE",
    "WIDTHS",
    "ChannelBits",
    "check_channel_bits",
    "code_bounds",
    "code_bytes",
    "pack",
    "total_bits",
    "total_channels",
    "unpack",
]
