"""The quantized caches that Transformers has for models that are not converted, by the names of this package."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, QuantizedCache
from transformers.cache_utils import HQQQuantizedLayer, QuantizedLayer, QuantoQuantizedLayer

from optimum_mla.core.errors import InvalidValueError, MissingDependencyError, UnsupportedModelError, first_line

SOURCE = "source"
"""Name of a source model with its unquantized cache; `source-NAME` is the source model with another cache."""
SOURCE_BITS: dict[str, tuple[int, ...]] = {"hqq": (8, 4, 2), "quanto": (4, 2), "kivi": (4, 2)}
"""Bits per number that quantized caches of a source store, by layout. HQQ cannot read its own codes of 3 bits."""
OVER_TOKENS, OVER_CHANNELS = 0, 1
"""Axes of HQQ groups: 64 tokens of one channel, or 64 neighbouring channels of one token, share scale and zero."""
AXES = {"hqq": (OVER_CHANNELS, OVER_CHANNELS), "quanto": (0, 0), "kivi": (OVER_TOKENS, OVER_CHANNELS)}
"""The axes of keys and values in each layout.

Those of HQQ and Quanto are what Transformers' documentation recommends; with either, 64 neighbouring numbers of one
token share their scale and zero. Those of KIVI are its paper's (arXiv 2402.02750, section 3.2).
"""
CACHE_NAME = re.compile(r"(?P<layout>[a-z]+)-int(?P<bits>\d)(-first(?P<first>[1-9]\d?))?")
"""Names of quantized caches, such as `hqq-int4`, and `hqq-int4-first4` where the first 4 tokens are not quantized."""
GROUPS_PACKED = 4
"""Groups whose number HQQ can pack with every number of bits."""
MODULES = {"hqq": "hqq.core.quantize", "quanto": "optimum.quanto", "kivi": "hqq.core.quantize"}
LIBRARIES = {"hqq": "hqq", "quanto": "quanto", "kivi": "hqq"}
"""The extra of this package that installs what a layout needs."""
SOURCE_NAMES = "source, " + ", ".join(
    f"source-{layout}-int{bits}" for layout, all_bits in SOURCE_BITS.items() for bits in all_bits
)
"""The baselines. Each quantized one may end in `-firstN`, which keeps the first N tokens unquantized."""


class KeepsFirst(QuantizedLayer):
    """A quantized cache layer that does not quantize the first tokens of a sequence.

    Attributes:
        first: Number of tokens that are kept in the model's dtype.
    """

    first = 0

    def _quantize(self, tensor: Tensor, axis: int) -> tuple[Tensor, Any]:
        rest = tensor[:, :, self.first :]
        return tensor[:, :, : self.first].clone(), super()._quantize(rest, axis) if rest.shape[2] else None

    def _dequantize(self, qtensor: tuple[Tensor, Any]) -> Tensor:
        first, rest = qtensor
        return first if rest is None else torch.cat([first, super()._dequantize(rest).to(first.dtype)], dim=2)


class QuantoLayer(KeepsFirst, QuantoQuantizedLayer):
    """The Quanto cache layer of Transformers, which can keep the first tokens as they are."""


class PaddedHQQLayer(HQQQuantizedLayer):
    """The HQQ cache layer of Transformers, for any number of tokens and for both axes.

    HQQ packs the codes of two or four groups into one byte and fails, some steps later, if their number does not
    divide. Here the numbers to quantize are padded by zeros, by less than four groups in all. Groups over tokens are
    filled up with copies of the last token.
    """

    def _quantize(self, tensor: Tensor, axis: int) -> tuple[Tensor, dict[str, Any]]:
        kept: dict[str, Any] = {}
        if axis == OVER_TOKENS:
            kept["tokens"] = tensor.shape[2]
            missing = -tensor.shape[2] % self.q_group_size
            tensor = torch.cat([tensor, tensor[:, :, -1:].expand(-1, -1, missing, -1)], dim=2).transpose(2, 3)
        flat = tensor.flatten()
        missing = -len(flat) % (self.q_group_size * GROUPS_PACKED)
        groups = torch.nn.functional.pad(flat, (0, missing)).view(-1, self.q_group_size)
        codes, meta = super()._quantize(groups, OVER_CHANNELS)
        return codes, {**meta, **kept, "states_shape": tensor.shape}

    def _dequantize(self, qtensor: tuple[Tensor, dict[str, Any]]) -> Tensor:
        codes, meta = qtensor
        shape = meta["states_shape"]
        states = super()._dequantize((codes, meta)).flatten()[: shape.numel()].view(shape)
        return states.transpose(2, 3)[:, :, : meta["tokens"]] if "tokens" in meta else states


class HQQLayer(KeepsFirst, PaddedHQQLayer):
    """The padded HQQ cache layer, which can keep the first tokens as they are."""


def default_baselines() -> tuple[str, ...]:
    """Return the baselines of a benchmark whose user names none."""
    return (SOURCE, f"{SOURCE}-hqq-int4") if find_spec("hqq") is not None else (SOURCE,)


def source_cache_name(baseline: str) -> str:
    """Return the name of the cache in the name of a baseline: `default` for `source`, `hqq-int4` for `source-hqq-int4`.

    Raises:
        InvalidValueError: There is no such cache.
        MissingDependencyError: The library that quantizes is not installed.
    """
    if baseline == SOURCE:
        return "default"
    name = baseline.removeprefix(f"{SOURCE}-")
    found = CACHE_NAME.fullmatch(name)
    if name == baseline or found is None or int(found["bits"]) not in SOURCE_BITS.get(found["layout"], ()):
        remedy = "Add -firstN to the name of a quantized one to keep the first N tokens unquantized."
        raise InvalidValueError("baselines", baseline, SOURCE_NAMES, remedy)
    try:
        import_module(MODULES[found["layout"]])
    except ImportError as error:
        library = LIBRARIES[found["layout"]]
        raise MissingDependencyError(error.name or library, library, f"measure {baseline}") from error
    return name


def source_cache(config: PreTrainedConfig, name: str) -> Cache:
    """Return an empty cache for a model that is not converted.

    Quantized caches are those of Transformers with the default settings of `generate`: groups of 64 numbers, and up to
    128 newest tokens in the model's own dtype. `kivi` is its HQQ cache with keys in groups over tokens, as in KIVI.

    Args:
        config: The config of the model.
        name: `default` for a `DynamicCache`, or `LAYOUT-intBITS`, with `-firstN` after it to keep the first N tokens.

    Raises:
        UnsupportedModelError: Transformers has no such cache for this model, as for those with sliding windows.
    """
    if name == "default":
        return DynamicCache(config=config)
    found = CACHE_NAME.fullmatch(name)
    if found is None:
        raise InvalidValueError("cache", name, "default, or LAYOUT-intBITS such as hqq-int4")
    layout = found["layout"]
    keys, values = AXES[layout]
    options: dict[str, Any] = {"nbits": int(found["bits"]), "axis_key": keys, "axis_value": values}
    kind = QuantoLayer if layout == "quanto" else HQQLayer
    try:
        cache = QuantizedCache(LIBRARIES[layout], config, **options)
        cache.layers = [kind(**options) for _ in cache.layers]
        for layer in cache.layers:
            layer.first = int(found["first"] or 0)
        return cache
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UnsupportedModelError(f"Transformers has no {name} cache for this model: {first_line(error)}") from error
