"""Weights quantized by HQQ (github.com/dropbox/hqq)."""

from __future__ import annotations

from typing import Any

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from torch import nn

from optimum_mla.weights.library import StoredLibrary
from optimum_mla.weights.quantizer import StoredWeightsConfig

GROUP = 64


class StoredHQQLinear(HQQLinear):
    """HQQ's layer with its tensors as buffers, so that it is saved, loaded and moved like any module.

    HQQ itself keeps scales and zeros in a dictionary, which `model.to(device)` does not move, and saves twenty tensors
    per layer.

    Args:
        linear: The layer whose shape, bias and dtype are taken.
        bits: Bits per code, 4 or 8.

    Attributes:
        W_q: Codes, uint8 [out·in / 64, 64]; two 4-bit codes share a byte, [out·in / 128, 64].
        scale: Scales of the groups, [out·in / 64, 1], in the dtype of the model.
        zero: Zeros of the groups, [out·in / 64, 1]; a weight is (code - zero)·scale.
    """

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        dtype, groups = linear.weight.dtype, linear.weight.numel() // GROUP
        super().__init__(None, quantize_config(bits), compute_dtype=dtype, device="cpu", initialize=False)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # HQQ's constructor sets plain attributes, whose names no buffer may take.
        self.__dict__.pop("W_q")
        self.W_q = nn.Buffer(torch.empty(groups * bits // 8, GROUP, dtype=torch.uint8))
        self.scale = nn.Buffer(torch.empty(groups, 1, dtype=dtype))
        self.zero = nn.Buffer(torch.empty(groups, 1, dtype=dtype))
        if linear.bias is not None:
            self.bias = nn.Parameter(torch.empty(linear.out_features, dtype=dtype))
        self.bits, self.ready = bits, True

    @classmethod
    def quantized(cls, linear: nn.Linear, bits: int) -> StoredHQQLinear:
        """Return a layer that holds the weight of `linear` as HQQ's codes."""
        device, dtype = linear.weight.device, linear.weight.dtype
        made = HQQLinear(linear, quantize_config(bits), del_orig=False, compute_dtype=dtype, device=str(device))
        with torch.device("meta"):
            stored = cls(linear, bits)
        stored.W_q, stored.scale, stored.zero = (
            nn.Buffer(tensor.detach()) for tensor in (made.W_q, made.meta["scale"], made.meta["zero"])
        )
        stored.bias = linear.bias
        return stored

    @property
    def meta(self) -> dict[str, Any]:
        """Return the description of the codes that HQQ's functions read."""
        packing = Quantizer.bit_to_packing[self.bits]
        return {
            "nbits": self.bits,
            "group_size": GROUP,
            "axis": 1,
            "shape": torch.Size([self.out_features, self.in_features]),
            "scale": self.scale,
            "zero": self.zero,
            "packing": packing,
            "unpack_view_dtype": Quantizer.unpack_view_dtype[packing],
            "view_as_float": False,
            "quant_scale": False,
            "quant_zero": False,
            "compute_dtype": self.compute_dtype,
        }

    @meta.setter
    def meta(self, value: None) -> None:
        """Ignore the None that HQQ's constructor sets."""

    def _apply(self, fn: Any, recurse: bool = True) -> StoredHQQLinear:
        super()._apply(fn, recurse)
        # HQQ has these as attributes, which adapters read.
        self.device, self.compute_dtype = str(self.scale.device), self.scale.dtype
        return self

    # HQQ overrides these methods in ways that do not work with buffers.
    state_dict = nn.Module.state_dict
    load_state_dict = nn.Module.load_state_dict
    _load_from_state_dict = nn.Module._load_from_state_dict
    to, cuda, cpu, type = nn.Module.to, nn.Module.cuda, nn.Module.cpu, nn.Module.type
    half, bfloat16, float, double = nn.Module.half, nn.Module.bfloat16, nn.Module.float, nn.Module.double


class HQQWeights(StoredLibrary):
    """Codes in groups of 64 numbers of a row, whose scales and zeros come from half-quadratic optimization."""

    def constraint(self, bits: int) -> str:
        return f"in_features divisible by {GROUP}" + (" and an even number of groups" if bits == 4 else "")

    def fits(self, linear: nn.Linear, bits: int) -> bool:
        # The two 4-bit codes in a byte belong to two groups.
        return linear.in_features % GROUP == 0 and linear.weight.numel() // GROUP * bits % 8 == 0

    def config(self, bits: int, skipped: list[str], dtype: torch.dtype) -> StoredWeightsConfig:
        return StoredWeightsConfig("mla_hqq", bits, skipped)

    def quantized(self, linear: nn.Linear, bits: int) -> nn.Module:
        return StoredHQQLinear.quantized(linear, bits)

    def empty(self, linear: nn.Linear, bits: int) -> nn.Module:
        return StoredHQQLinear(linear, bits)


def quantize_config(bits: int) -> dict[str, Any]:
    """Return the settings of HQQ for codes of so many bits."""
    settings = BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=1)
    # HQQ does this by default at 4 bits. At 8 bits it is needed because bfloat16 would round a fractional zero.
    settings["weight_quant_params"]["round_zero"] = True
    return settings
