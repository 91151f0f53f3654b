"""Weights quantized by bitsandbytes, in the format of Transformers."""

from __future__ import annotations

from typing import Any

import accelerate  # noqa: F401  (Transformers needs it to load these weights)
import bitsandbytes
import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations import replace_with_bnb_linear

from optimum_mla.models.classes import keep_storable
from optimum_mla.weights.library import WeightLibrary

GROUP = 64
"""Numbers in a block of 4-bit codes."""


class BitsAndBytesWeights(WeightLibrary):
    """NF4 in blocks of 64 numbers (QLoRA, arXiv 2305.14314), and LLM.int8() with a scale per row (arXiv 2208.07339)."""

    def constraint(self, bits: int) -> str:
        return f"in_features divisible by {GROUP}" if bits == 4 else "any"

    def fits(self, linear: nn.Linear, bits: int) -> bool:
        return bits == 8 or linear.in_features % GROUP == 0

    def config(self, bits: int, skipped: list[str], dtype: torch.dtype) -> BitsAndBytesConfig:
        if bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skipped,
        )

    def quantized(self, linear: nn.Linear, bits: int) -> nn.Module:
        # Transformers makes the layer as it does when it loads a model, so that the two cannot differ.
        holder = nn.ModuleDict({"layer": linear})
        replace_with_bnb_linear(holder, [], self.config(bits, [], linear.weight.dtype))
        layer: Any = holder["layer"]
        weight, settings = linear.weight.detach(), vars(layer.weight)
        # Parameters are quantized when they are moved to a device; 8-bit ones have to come from the CPU.
        if bits == 8:
            settings = {"has_fp16_weights": settings["has_fp16_weights"]}
            layer.weight = bitsandbytes.nn.Int8Params(weight.cpu(), False, **settings).to(weight.device)
        else:
            layer.weight = bitsandbytes.nn.Params4bit(weight, False, **settings).to(weight.device)
        layer.bias = linear.bias
        keep_storable(layer)
        return layer
