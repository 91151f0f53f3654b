"""Quantization by optimum-quanto (github.com/huggingface/optimum-quanto)."""

from __future__ import annotations

from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qint2, qint4, qint8, quantize_weight
from optimum.quanto.tensor.packed import PackedTensor
from torch import Tensor

from optimum_mla.cache.backends import Backend, Encoded, parameter_dtype

AXIS = -1
"""The axis argument with which Quanto gives every column its own scale and shift."""


class QuantoBackend(Backend):
    """Affine codes of 4 or 2 bits, and symmetric codes of 8 bits."""

    bits_allowed = (8, 4, 2)
    package = "quanto"

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.lanes = tuple(range(0, 8, bits))
        self.parameters = 1 if bits == 8 else 2

    def encode(self, columns: Tensor) -> Encoded:
        x = columns.to(parameter_dtype(columns.dtype))
        if self.bits == 8:
            scale = AbsmaxOptimizer()(x, qint8, AXIS)
            return Encoded(quantize_weight(x, qint8, AXIS, scale)._data, scale.reshape(-1), None)
        kind = qint4 if self.bits == 4 else qint2
        scale, shift = MaxOptimizer()(x, kind, AXIS)
        packed = quantize_weight(x, kind, AXIS, scale, shift, optimized=False)._data
        # The sign changes because Quanto subtracts its shift, and `Encoded` adds it.
        return Encoded(packed.unpack(), scale.reshape(-1), -shift.reshape(-1))

    def pack(self, codes: Tensor) -> Tensor:
        return codes if self.bits == 8 else PackedTensor.pack(codes, self.bits)._data
