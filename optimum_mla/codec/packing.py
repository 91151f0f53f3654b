"""Packing of codes into bytes without gaps, and back.

Codes of 8 bits are bytes. Others are split into parts of 4, 2 and 1 bits, of which 2, 4 and 8 fill a byte: 6 = 4 + 2,
5 = 4 + 1, 3 = 2 + 1. The parts of one size of all channels form a plane. Within a plane of n parts, k to a byte, the
first n/k parts are in the lowest bits of its bytes, the next ones in the bits above, and so on. So unpacking works on
few long runs, whatever the bits of the channels are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from optimum_mla.codec.codes import code_bounds, zero_points
from optimum_mla.codec.constants import constant
from optimum_mla.core.segments import ChannelBits, total_bits, total_channels

PARTS = {8: (8,), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,)}
"""The parts of a code by its bits; the lowest bits come first."""


def code_bytes(channels: ChannelBits) -> int:
    """Return the bytes of one token's codes."""
    return total_bits(channels) // 8


class Plane(NamedTuple):
    """The parts of one size.

    Attributes:
        part: Bits of a part.
        bytes: The bytes of the plane.
        segments: For each run of channels with such parts, the channels and the position of the part in their codes.
    """

    part: int
    bytes: slice
    segments: tuple[tuple[slice, int], ...]

    @property
    def lanes(self) -> int:
        """Return the number of parts in a byte."""
        return 8 // self.part

    @property
    def mask(self) -> int:
        """Return the number whose bits are those of a part."""
        return 2**self.part - 1


@lru_cache(maxsize=1024)
def _planes(channels: ChannelBits) -> tuple[Plane, ...]:
    planes: list[Plane] = []
    byte = 0
    for part in (8, 4, 2, 1):
        found: list[tuple[slice, int]] = []
        channel = 0
        for bits, count in channels:
            if part in PARTS[bits]:
                lowest, start = sum(PARTS[bits][: PARTS[bits].index(part)]), channel
                if found and found[-1][0].stop == start and found[-1][1] == lowest:
                    start = found.pop()[0].start  # One long run is unpacked faster than two.
                found.append((slice(start, channel + count), lowest))
            channel += count
        size = sum(of.stop - of.start for of, _ in found) * part // 8
        if found:
            planes.append(Plane(part, slice(byte, byte + size), tuple(found)))
        byte += size
    return tuple(planes)


@lru_cache(maxsize=1024)
def _places(channels: ChannelBits) -> tuple[tuple[int, ...], ...]:
    """Return of every part its channel, its lowest bit there, its mask, its lowest bit in its byte, and the byte."""
    found: list[tuple[int, int, int, int, int]] = []
    for plane in _planes(channels):
        parts = [(channel, lowest) for of, lowest in plane.segments for channel in range(of.start, of.stop)]
        size = plane.bytes.stop - plane.bytes.start
        found += [
            (channel, lowest, plane.mask, plane.part * (place // size), plane.bytes.start + place % size)
            for place, (channel, lowest) in enumerate(parts)
        ]
    return tuple(zip(*found, strict=True))


def _shifts(plane: Plane, device: torch.device) -> Tensor:
    """Return by how many bits each part of a byte is shifted, [lanes, 1, 1]."""
    return constant(tuple(range(0, 8, plane.part)), torch.uint8, device)[:, None, None]


def pack(codes: Tensor, channels: ChannelBits) -> Tensor:
    """Return codes packed into bytes, [..., `code_bytes`, T] uint8.

    The bytes of one place lie side by side for all tokens, because unpacking is fast on long runs only.

    Args:
        codes: Codes as integers or as floating-point numbers, [..., T, r]; what is not a code is clamped and rounded.
        channels: Bits of the channels.
    """
    low, high = code_bounds(channels, codes.new_empty(0, dtype=torch.float32))
    whole = (codes.float().round().clamp(low, high) - low).to(torch.uint8).mT.contiguous()
    channel, *numbers, byte = _places(channels)
    lowest, mask, shift = (constant(of, torch.uint8, whole.device)[:, None] for of in numbers)
    parts = whole.index_select(-2, constant(channel, torch.int64, whole.device))
    placed = ((parts >> lowest) & mask) << shift
    packed = whole.new_zeros(*whole.shape[:-2], code_bytes(channels), whole.shape[-1])
    return packed.index_add_(-2, constant(byte, torch.int64, whole.device), placed)  # Parts of a byte share no bits.


def unpack(packed: Tensor, channels: ChannelBits, out: Tensor) -> Tensor:
    """Unpack codes into `out` as numbers of its dtype, and return it.

    Args:
        packed: Packed codes, [..., `code_bytes`, T] uint8.
        channels: Bits of the channels.
        out: The tensor to write into, [..., T, r]. It is fastest if the numbers of a channel are contiguous.
    """
    whole = packed.new_empty(*packed.shape[:-2], total_channels(channels), packed.shape[-1])
    for plane in _planes(channels):
        stored = packed[..., plane.bytes, :]
        parts = stored
        if plane.lanes > 1:
            lanes = (stored.unsqueeze(-3) >> _shifts(plane, packed.device)).bitwise_and_(plane.mask)
            parts = lanes.flatten(-3, -2)
        start = 0
        for of, lowest in plane.segments:
            stop = start + of.stop - of.start
            piece = parts[..., start:stop, :]
            if lowest:
                whole[..., of, :].add_(piece, alpha=2**lowest)
            else:  # The planes of larger parts come first, and they hold the lowest bits.
                whole[..., of, :] = piece
            start = stop
    half = constant(zero_points(channels), torch.uint8, packed.device)
    whole -= half[:, None]  # Wraps around to the code's two's complement.
    out.mT.copy_(whole.view(torch.int8))
    return out
