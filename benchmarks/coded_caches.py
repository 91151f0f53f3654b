"""Caches that code every key and value of an unconverted model as soon as it arrives, to measure what coding costs.

What comes out of such a cache went through a codec once, as at a long context, where hardly any token is still in full
precision. The numbers are kept decoded, because these caches measure quality and not memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer, PreTrainedConfig

from optimum_mla.cache.source import source_cache

Codec = Callable[[Tensor], Tensor]
"""Maps keys or values [B, G, S, D] to what is left of them after coding."""
KIVI_GROUP = 64
"""Numbers that share a scale and a zero in KIVI's layout: tokens of one key channel, or channels of one value."""
SCALE_BITS = 32
"""Bits of a 16-bit scale and a 16-bit zero."""


class CodedLayer(DynamicLayer):
    """The cache of one layer, which codes what arrives.

    Args:
        keys: The codec of keys.
        values: The codec of values.
        sinks: First tokens of the sequence that are kept as they are.
    """

    def __init__(self, keys: Codec, values: Codec, sinks: int) -> None:
        super().__init__()
        self.codecs, self.sinks = (keys, values), sinks

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Code the new tokens, store them, and return all tokens."""
        kept = max(0, self.sinks - self.get_seq_length())
        coded = []
        for codec, states in zip(self.codecs, (key_states, value_states), strict=True):
            new = codec(states)
            coded.append(torch.cat([states[:, :, :kept], new[:, :, kept:]], dim=2))
        return super().update(coded[0], coded[1], *args, **kwargs)


def library_codec(config: PreTrainedConfig, name: str) -> Codec:
    """Return the codec of one of Transformers' quantized caches, such as `hqq-int4`."""
    layer: Any = source_cache(config, name).layers[0]

    def code(states: Tensor) -> Tensor:
        layer.keys = states.new_empty(0)  # The dtype and the device that the layer codes for.
        axis = layer.axis_key
        return layer._dequantize(layer._quantize(states.contiguous(), axis)).to(states.dtype)

    return code


def affine(states: Tensor, bits: int, dim: int) -> Tensor:
    """Return states after rounding to 2**bits levels between the least and the largest value along a dimension."""
    low, high = states.amin(dim, keepdim=True), states.amax(dim, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(states.dtype).tiny)
    return ((states - low) / step).round() * step + low


def kivi_keys(bits: int) -> Codec:
    """Return the codec of KIVI (arXiv 2402.02750) for keys: each channel over groups of 64 tokens."""
    return lambda states: torch.cat([affine(part, bits, 2) for part in states.split(KIVI_GROUP, dim=2)], dim=2)


def kivi_values(bits: int) -> Codec:
    """Return the codec of KIVI for values: each token in groups of 64 channels."""
    return lambda states: torch.cat([affine(part, bits, 3) for part in states.split(KIVI_GROUP, dim=3)], dim=3)


def coded_cache(config: PreTrainedConfig, name: str, sinks: int) -> Cache:
    """Return an empty cache that codes every token.

    Args:
        config: The config of the source model.
        name: `kivi-intBITS`, or a name of `optimum_mla.cache.source.source_cache`.
        sinks: First tokens that are kept as they are.
    """
    family, _, bits = name.rpartition("-int")
    kivi = family == "kivi"
    keys = kivi_keys(int(bits)) if kivi else library_codec(config, name)
    values = kivi_values(int(bits)) if kivi else library_codec(config, name)
    return Cache(layers=[CodedLayer(keys, values, sinks) for _ in range(config.num_hidden_layers)])


def kivi_percent(bits: int) -> float:
    """Return what KIVI's layout stores per number, in percent of 16 bits."""
    return 100 * (bits + SCALE_BITS / KIVI_GROUP) / 16
