"""Integer codes of latents with a fixed number of bits in each channel."""

from optimum_mla.codec.codes import code_bounds, coded, is_coded
from optimum_mla.codec.packing import code_bytes, pack, unpack
from optimum_mla.core.segments import GRANULE, WIDTHS, ChannelBits, check_channel_bits, total_bits, total_channels

__all__ = [
    "GRANULE",
    "WIDTHS",
    "ChannelBits",
    "check_channel_bits",
    "code_bounds",
    "code_bytes",
    "coded",
    "is_coded",
    "pack",
    "total_bits",
    "total_channels",
    "unpack",
]
