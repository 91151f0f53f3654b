"""Quantization by HQQ's `Quantizer` (github.com/dropbox/hqq)."""

from __future__ import annotations

import torch
from hqq.core.quantize import Quantizer
from torch import Tensor

from optimum_mla.cache.backends import Backend, parameter_dtype

LARGEST_ZERO = 6e4
"""A column whose zero would be larger, in codes, counts as constant: the zero would overflow 16 bits."""


class HQQBackend(Backend):
    """Affine codes, (code - zero)·scale.

    HQQ's half-quadratic search is off: it is slow (20 times at one block), and stops by the mean error of all columns,
    so that a row would depend on its batch. HQQ also takes ranges under 1e-4 for zero; columns are scaled to range 1
    first.
    """

    bits_allowed = (8, 4, 3, 2)
    package = "hqq"

    def encode(self, columns: Tensor) -> tuple[Tensor, ...]:
        x = columns.float()
        lowest, highest = x.amin(0, keepdim=True), x.amax(0, keepdim=True)
        span, size = highest - lowest, x.abs().amax(0, keepdim=True)
        constant = span * LARGEST_ZERO <= size * (2**self.bits - 1)
        x = torch.where(constant, (lowest + highest) / 2, x)
        span = torch.where(constant, torch.where(size > 0, size, torch.ones_like(size)), span)
        codes, meta = Quantizer.quantize(
            x / span,
            nbits=self.bits,
            group_size=x.shape[0],
            axis=0,
            optimize=False,
            # A whole zero is exact in 16 bits, where half a step of 8-bit codes would not be.
            round_zero=self.bits == 8,
            device=str(x.device),
        )
        kind = parameter_dtype(columns.dtype)
        return codes, (meta["scale"] * span).to(kind), meta["zero"].to(kind)

    def decode(self, stored: tuple[Tensor, ...], rows: int, dtype: torch.dtype) -> Tensor:
        codes, scale, zero = stored
        meta = {
            "compute_dtype": dtype,
            "packing": Quantizer.bit_to_packing[self.bits],
            "view_as_float": False,
            "nbits": self.bits,
            "axis": 0,
            "group_size": rows,
            "scale": scale.to(dtype),
            "zero": zero.to(dtype),
            "shape": (rows, codes.shape[-1]),
        }
        return Quantizer.dequantize(codes, meta)
