"""Quantization by HQQ's `Quantizer` (github.com/dropbox/hqq)."""

from __future__ import annotations

import math

import torch
from hqq.core.quantize import Quantizer
from torch import Tensor

from optimum_mla.cache.backends import Backend, Encoded, parameter_dtype


class HQQBackend(Backend):
    """Affine codes of 8, 4, 3 or 2 bits.

    From 8-bit codes 128 is subtracted before they are stored, so that their products with the scale are not larger than
    the numbers themselves.

    HQQ's half-quadratic optimization is switched off. It takes 20 times as long for one block, and it stops by the mean
    error over all columns, so that a row's codes would depend on the other rows of its batch. HQQ also treats ranges
    below 1e-4 as zero. Columns are therefore scaled to range 1 before HQQ sees them, and shifted close to zero, where
    the zero point loses no precision in 16 bits.
    """

    bits_allowed = (8, 4, 3, 2)
    package = "hqq"

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.centre = 128 if bits == 8 else 0
        # HQQ packs ten 3-bit codes into an int32, and other codes into bytes, with the first code in the highest bits.
        word = 30 if bits == 3 else 8
        self.lanes = tuple(range(word - bits, -1, -bits))

    def packed_bits(self, numbers: int) -> int:
        return 32 * math.ceil(numbers / 10) if self.bits == 3 else super().packed_bits(numbers)

    def encode(self, columns: Tensor) -> Encoded:
        x, kind = columns.float(), parameter_dtype(columns.dtype)
        lowest, highest = x.amin(0, keepdim=True), x.amax(0, keepdim=True)
        span = highest - lowest
        anchor = (lowest + highest) / 2 if self.centre else lowest
        codes, meta = Quantizer.quantize(
            (x - anchor) / torch.where(span > 0, span, torch.ones_like(span)),
            nbits=self.bits,
            group_size=x.shape[0],
            axis=0,
            optimize=False,
            bitpack=False,
            device=str(x.device),
        )
        scale = meta["scale"] * span
        shift = anchor - (meta["zero"] - self.centre) * scale
        return Encoded(codes - self.centre, scale[0].to(kind), shift[0].to(kind))

    def pack(self, codes: Tensor) -> Tensor:
        return codes.to(torch.int8) if self.bits == 8 else Quantizer.pack[Quantizer.bit_to_packing[self.bits]](codes)
