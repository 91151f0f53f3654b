"""Quantization by HQQ's `Quantizer` (github.com/dropbox/hqq)."""

from __future__ import annotations

import torch
from hqq.core.quantize import Quantizer
from torch import Tensor

from optimum_mla.cache.backends import Backend, parameter_dtype

SMALLEST_RANGE = 1e-3
"""A column's range counts as at least so much of its largest number, or its zero would overflow 16 bits."""


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
        span = x.amax(0, keepdim=True) - x.amin(0, keepdim=True)
        span = torch.maximum(span, SMALLEST_RANGE * x.abs().amax(0, keepdim=True))
        span = torch.where(span > 0, span, torch.ones_like(span))
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
