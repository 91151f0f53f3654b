"""The quantized caches that Transformers has for models that are not converted, by the names of this package."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, QuantizedCache
from transformers.cache_utils import HQQQuantizedLayer

from optimum_mla.core.errors import InvalidValueError, MissingDependencyError, UnsupportedModelError, first_line

SOURCE = "source"
"""Name of a source model with its unquantized cache; `source-NAME` is the source model with another cache."""
SOURCE_BITS: dict[str, tuple[int, ...]] = {"hqq": (8, 4, 2), "quanto": (4, 2)}
"""Bits per number that Transformers' quantized caches store, by backend. HQQ cannot read its own codes of 3 bits."""
AXES = {"hqq": 1, "quanto": 0}
"""The axis that Transformers' documentation recommends for each backend.

With either, 64 neighbouring numbers of one token share their scale and zero.
"""
GROUPS_PACKED = 4
"""Groups whose number HQQ can pack with every number of bits."""
MODULES = {"hqq": "hqq.core.quantize", "quanto": "optimum.quanto"}
SOURCE_NAMES = "source, " + ", ".join(
    f"source-{backend}-int{bits}" for backend, all_bits in SOURCE_BITS.items() for bits in all_bits
)


class PaddedHQQLayer(HQQQuantizedLayer):
    """The HQQ cache layer of Transformers, for any number of tokens.

    HQQ packs the codes of two or four groups into one byte and fails, some steps later, if their number does not
    divide. Here the numbers to quantize are padded by zeros, by less than four groups in all.
    """

    def _quantize(self, tensor: Tensor, axis: int) -> tuple[Tensor, dict[str, Any]]:
        flat = tensor.flatten()
        missing = -len(flat) % (self.q_group_size * GROUPS_PACKED)
        groups = torch.nn.functional.pad(flat, (0, missing)).view(-1, self.q_group_size)
        codes, meta = super()._quantize(groups, axis)
        return codes, {**meta, "states_shape": tensor.shape}

    def _dequantize(self, qtensor: tuple[Tensor, dict[str, Any]]) -> Tensor:
        codes, meta = qtensor
        shape = meta["states_shape"]
        return super()._dequantize((codes, meta)).flatten()[: shape.numel()].view(shape)


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
    backend, _, bits = name.rpartition("-int")
    if name == baseline or backend not in SOURCE_BITS or bits not in map(str, SOURCE_BITS[backend]):
        raise InvalidValueError("baselines", baseline, SOURCE_NAMES)
    try:
        import_module(MODULES[backend])
    except ImportError as error:
        raise MissingDependencyError(error.name or backend, backend, f"measure {baseline}") from error
    return name


def source_cache(config: PreTrainedConfig, name: str) -> Cache:
    """Return an empty cache for a model that is not converted.

    Quantized caches are those of Transformers with the default settings of `generate`: groups of 64 numbers, and up to
    128 newest tokens in the model's own dtype.

    Args:
        config: The config of the model.
        name: `default` for a `DynamicCache`, or `BACKEND-intBITS`.

    Raises:
        UnsupportedModelError: Transformers has no such cache for this model, as for those with sliding windows.
    """
    if name == "default":
        return DynamicCache(config=config)
    backend, _, bits = name.rpartition("-int")
    options: dict[str, Any] = {"nbits": int(bits), "axis_key": AXES[backend], "axis_value": AXES[backend]}
    try:
        cache = QuantizedCache(backend, config, **options)
        if backend == "hqq":
            cache.layers = [PaddedHQQLayer(**options) for _ in cache.layers]
        return cache
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UnsupportedModelError(f"Transformers has no {name} cache for this model: {first_line(error)}") from error
