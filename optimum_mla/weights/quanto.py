"""Weights quantized by optimum-quanto (github.com/huggingface/optimum-quanto)."""

from __future__ import annotations

import torch
from optimum.quanto import QLinear, qint4, qint8
from torch import nn

from optimum_mla.weights.library import StoredLibrary
from optimum_mla.weights.quantizer import StoredWeightsConfig

KINDS = {4: qint4, 8: qint8}
GROUP = 64
"""Numbers of a row in a group of 4-bit codes. Quanto's default of 128 would use kernels (TinyGemm, AWQ) that round the
parameters in bfloat16 and cannot return the stored ones, so that every save would change the model."""
ALIGNMENT = 16
"""The length of rows of 8-bit codes is a multiple of this; otherwise the bfloat16 kernel of PyTorch for CPUs, which
Quanto calls, ends the process."""


class EmptyQLinear(nn.Module):
    """Holds the tensors of a frozen `QLinear` under their names in its `state_dict` until they are loaded.

    `QLinear.weight` is one object around these tensors, which Transformers cannot load piece by piece.

    Args:
        linear: The layer whose shape, bias and dtype are taken.
        bits: Bits per code, 4 or 8.
    """

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        dtype, (rows, columns) = linear.weight.dtype, linear.weight.shape
        self.layer = {"in_features": columns, "out_features": rows, "dtype": dtype, "weights": KINDS[bits]}
        self.weight = nn.Module()
        if bits == 8:
            self.weight._data = nn.Buffer(torch.empty(rows, columns, dtype=torch.int8))
            self.weight._scale = nn.Buffer(torch.empty(rows, 1, dtype=dtype))
        else:
            groups = rows * columns // GROUP
            self.weight._data = nn.Module()
            # Two codes share a byte.
            self.weight._data._data = nn.Buffer(torch.empty((groups + 1) // 2, GROUP, dtype=torch.uint8))
            self.weight._scale = nn.Buffer(torch.empty(groups, 1, dtype=dtype))
            self.weight._shift = nn.Buffer(torch.empty(groups, 1, dtype=dtype))
        self.input_scale = nn.Buffer(torch.empty((), dtype=dtype))
        self.output_scale = nn.Buffer(torch.empty((), dtype=dtype))
        self.bias = None if linear.bias is None else nn.Parameter(torch.empty(rows, dtype=dtype))

    def finished(self) -> QLinear:
        """Return Quanto's layer with the loaded tensors."""
        layer = grouped(QLinear(**self.layer, bias=self.bias is not None, device="meta"))
        # Tensors in the memory map of a checkpoint lie at any address, and the kernel for bfloat16 needs them aligned.
        tensors = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        layer.load_state_dict(tensors, assign=True)
        return layer


class QuantoWeights(StoredLibrary):
    """Symmetric 8-bit codes with one scale per row, or affine 4-bit codes in groups of 64 numbers of a row."""

    def constraint(self, bits: int) -> str:
        return f"in_features divisible by {GROUP if bits == 4 else ALIGNMENT}"

    def fits(self, linear: nn.Linear, bits: int) -> bool:
        return linear.in_features % (GROUP if bits == 4 else ALIGNMENT) == 0

    def config(self, bits: int, skipped: list[str], dtype: torch.dtype) -> StoredWeightsConfig:
        return StoredWeightsConfig("mla_quanto", bits, skipped)

    def quantized(self, linear: nn.Linear, bits: int) -> nn.Module:
        layer = grouped(QLinear.from_module(linear, weights=KINDS[bits]))
        layer.freeze()
        return layer

    def empty(self, linear: nn.Linear, bits: int) -> nn.Module:
        return EmptyQLinear(linear, bits)

    def finished(self, module: nn.Module) -> nn.Module:
        return module.finished() if isinstance(module, EmptyQLinear) else module


def grouped(layer: QLinear) -> QLinear:
    """Set the group size of a layer that is not quantized yet, and return the layer."""
    layer.weight_group_size = GROUP if layer.weight_qtype is qint4 else None
    return layer
