"""Packing of codes into bytes without gaps, and back.

A segment of n channels with b bits each takes n·b/8 bytes. Codes of 8 bits are bytes; 4, 2 and 1 bits fill a byte with
2, 4 and 8 codes; 6, 5 and 3 bits are split into parts of 4, 2 and 1 bits, which are packed one after the other. Within
a part the first n/k codes are in the lowest bits of the bytes, the next ones in the bits above, and so on, so that
unpacking writes contiguous runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from optimum_mla.core.segments import ChannelBits, total_bits

PARTS = {8: (8,), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,)}
"""The parts of a code, each of which fills a byte with a whole number of codes; the lowest bits come first."""


def code_bytes(channels: ChannelBits) -> int:
    """Return the bytes of one token's codes."""
    return total_bits(channels) // 8


class Run(NamedTuple):
    """One part of the codes of a segment.

    Attributes:
        bits: Bits of the segment's codes.
        part: Bits of the part.
        lowest: Position of the part's lowest bit in the codes.
        channels: The channels of the segment.
        bytes: The bytes of the part.
    """

    bits: int
    part: int
    lowest: int
    channels: slice
    bytes: slice


def _runs(channels: ChannelBits) -> Iterator[Run]:
    channel = byte = 0
    for bits, count in channels:
        lowest = 0
        for part in PARTS[bits]:
            size = count * part // 8
            yield Run(bits, part, lowest, slice(channel, channel + count), slice(byte, byte + size))
            byte, lowest = byte + size, lowest + part
        channel += count


def pack(codes: Tensor, channels: ChannelBits) -> Tensor:
    """Return codes packed into bytes, [..., `code_bytes`] uint8.

    Args:
        codes: Codes as integers or as floating-point numbers, [..., r]; what is not a code is clamped and rounded.
        channels: Bits of the channels.
    """
    packed = torch.empty(*codes.shape[:-1], code_bytes(channels), dtype=torch.uint8, device=codes.device)
    for run in _runs(channels):
        half = 2 ** (run.bits - 1)
        whole = codes[..., run.channels].float().round().clamp(-half, half - 1).to(torch.int16) + half
        piece = ((whole >> run.lowest) & (2**run.part - 1)).to(torch.uint8)
        lanes = piece.unflatten(-1, (8 // run.part, -1))
        byte = lanes[..., 0, :].clone()
        for lane in range(1, 8 // run.part):
            byte |= lanes[..., lane, :] << (run.part * lane)
        packed[..., run.bytes] = byte
    return packed


def unpack(packed: Tensor, channels: ChannelBits, out: Tensor) -> Tensor:
    """Unpack codes into `out` as numbers of its dtype, and return it.

    Args:
        packed: Packed codes, [..., `code_bytes`] uint8.
        channels: Bits of the channels.
        out: The tensor to write into, [..., r].
    """
    for run in _runs(channels):
        stored, lanes = packed[..., run.bytes], 8 // run.part
        target = out[..., run.channels].unflatten(-1, (lanes, -1))
        for lane in range(lanes):
            piece = stored if lanes == 1 else (stored >> (run.part * lane)) & (2**run.part - 1)
            if run.lowest:
                target[..., lane, :].add_(piece, alpha=2**run.lowest)
            else:
                target[..., lane, :].copy_(piece)
        if run.lowest + run.part == run.bits:
            out[..., run.channels].sub_(2 ** (run.bits - 1))
    return out
