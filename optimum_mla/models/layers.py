"""The layers that a config describes: their shapes, their attention and their caches."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from optimum_mla.cache import CacheSettings, LatentCache, LatentLayer
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.core.geometry import MLAGeometry, ModelGeometry
from optimum_mla.families.project import pair_table
from optimum_mla.families.spec import AttentionSpec, layer_type, sliding_window
from optimum_mla.nn import ATTENTION_FORMS, LatentAttention


def model_geometry(spec: AttentionSpec, config: Any) -> ModelGeometry:
    """Return the shapes of all attention layers of a source or converted model's config."""
    return ModelGeometry(tuple(spec.geometry(layer) for layer in config.per_layer_config))


def kept_layers(config: Any) -> list[str]:
    """Return which layers keep the source's attention in a converted model, in a line for each reason."""
    kept = [index for index, layer in enumerate(config.per_layer_config) if layer.attention_form == "source"]
    windowed = [index for index in kept if sliding_window(config, index) is not None]
    lines = []
    for layers, why in (
        (windowed, "a sliding window bounds their cache by itself"),
        ([index for index in kept if index not in windowed], "they were not chosen by --layers"),
    ):
        if layers:
            lines.append(f"layers {', '.join(map(str, layers))} keep their attention: {why}")
    return lines


def build_attention(
    spec: AttentionSpec, config: Any, layer: int, rotary: nn.Module, geometry: MLAGeometry | None = None
) -> LatentAttention:
    """Return the latent attention module of one converted layer, with the weights that `torch.nn` starts from.

    The module keeps the model's config, not its layer's: `set_attn_implementation` changes the former only.

    Args:
        geometry: Shape of the layer; None reads it from the config.
    """
    geometry = geometry or spec.geometry(config.per_layer_config[layer])
    return ATTENTION_FORMS[geometry.attention_form](
        config,
        geometry,
        layer,
        rotary,
        pairs=pair_table(spec, config, layer, rotary),
        layer_type=layer_type(config, layer),
        sliding_window=sliding_window(config, layer),
    )


def quantizable_layers(spec: AttentionSpec, config: Any) -> list[int]:
    """Return the indices of the layers whose cache is a `LatentLayer`."""
    return [
        index
        for index, geometry in enumerate(model_geometry(spec, config).layers)
        if geometry.attention_form != "source" and sliding_window(config, index) is None
    ]


def latent_cache(spec: AttentionSpec, config: Any, offloading: bool = False, **settings: Any) -> LatentCache:
    """Return an empty cache for a converted model's config.

    Layers that keep the source's attention get what Transformers gives them. So do layers with a sliding window: what
    they hold is bounded by it, and all of a model's windowed layers must hold the same tokens.
    """
    stored = CacheSettings.from_dict({**(config.latent_cache or {}), **settings})
    latent = quantizable_layers(spec, config)
    layers: list[CacheLayerMixin] = []
    for index, geometry in enumerate(model_geometry(spec, config).layers):
        window = sliding_window(config, index)
        if index in latent:
            layers.append(LatentLayer(geometry, stored))
        else:
            layers.append(DynamicLayer() if window is None else DynamicSlidingWindowLayer(window))
    return LatentCache(layers, offloading)


def quantized_settings(cache_config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `CacheSettings` for the `cache_config` of Transformers' quantized cache.

    Raises:
        InvalidValueError: The `cache_config` has an entry that a latent cache does not know.
    """
    names = {"backend": "backend", "nbits": "bits", "q_group_size": "group_size", "residual_length": "residual_length"}
    if unknown := [name for name in cache_config if name not in names]:
        remedy = "Latents are always coded token by token." if "axis" in unknown[0] else "Leave it out."
        raise InvalidValueError("cache_config", unknown[0], ", ".join(names), remedy)
    return {"bits": 4, "backend": "quanto", **{names[name]: value for name, value in cache_config.items()}}
