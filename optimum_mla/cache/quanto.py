"""Quantization by optimum-quanto (github.com/huggingface/optimum-quanto)."""

from __future__ import annotations

import torch
from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qint2, qint4, qint8, quantize_weight
from optimum.quanto.tensor import WeightQBitsTensor, WeightQBytesTensor
from optimum.quanto.tensor.packed import PackedTensor
from torch import Tensor

from optimum_mla.cache.backends import Backend, parameter_dtype

AXIS = -1
"""Quanto's name for one set of parameters per column."""


class QuantoBackend(Backend):
    """Affine 4- and 2-bit codes, code·scale - shift; symmetric 8-bit codes, code·scale."""

    bits_allowed = (8, 4, 2)
    package = "quanto"

    def encode(self, columns: Tensor) -> tuple[Tensor, ...]:
        x = columns.to(parameter_dtype(columns.dtype))
        if self.bits == 8:
            scale = AbsmaxOptimizer()(x, qint8, AXIS)
            return quantize_weight(x, qint8, AXIS, scale)._data, scale.reshape(1, -1)  # of one column it is 0-dim
        kind = qint4 if self.bits == 4 else qint2
        scale, shift = MaxOptimizer()(x, kind, AXIS)
        packed = quantize_weight(x, kind, AXIS, scale, shift, optimized=False)
        return packed._data._data, scale, shift

    def decode(self, stored: tuple[Tensor, ...], rows: int, dtype: torch.dtype) -> Tensor:
        codes, *parameters = stored
        scale, *shift = [parameter.to(dtype) for parameter in parameters]
        size = torch.Size([rows, codes.shape[-1]])
        stride = (size[1], 1)
        if self.bits == 8:
            return WeightQBytesTensor(qint8, AXIS, size, stride, codes, scale, None).dequantize()
        kind = qint4 if self.bits == 4 else qint2
        packed = PackedTensor(codes, self.bits, size, stride)
        return WeightQBitsTensor(kind, AXIS, None, size, stride, packed, scale, shift[0]).dequantize()
