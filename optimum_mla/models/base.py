"""The parts that the converted models of all families share: config fields, construction, recording, saving."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from optimum_mla.cache import CacheSettings, LatentCache, LatentLayer
from optimum_mla.core.errors import InvalidValueError, UnsupportedModelError
from optimum_mla.core.geometry import MLAGeometry, ModelGeometry
from optimum_mla.families.spec import AttentionSpec, sliding_window
from optimum_mla.nn import ATTENTION_FORMS, DecoupledLatentAttention, LatentAttention
from optimum_mla.nn.decoupled import default_rope_pairs
from optimum_mla.ops.positions import check_given_positions
from optimum_mla.stack import (
    CACHE_ARGUMENT,
    cache_name,
    cache_position,
    check_keywords,
    forward_keywords,
    renamed_cache,
    require_cache,
)

MLA_CONFIG_FIELDS: dict[str, tuple[Any, Any]] = {
    "attention_form": (str, "source"),
    "mla_method": (str | None, None),
    "kv_lora_rank": (int, 0),
    "k_lora_rank": (int, 0),
    "v_lora_rank": (int, 0),
    "q_lora_rank": (int | None, None),
    "qk_nope_head_dim": (int, 0),
    "qk_rope_head_dim": (int, 0),
    "num_rope_heads": (int, 1),
    "v_head_dim": (int, 0),
    "num_up_heads": (int, 0),
    "rope_cache": (str, "cached"),
    "latent_norm": (bool, False),
    "latent_bias": (bool, False),
}
"""Type and default of every field that a converted config adds; all but `mla_method` are `MLAGeometry`'s fields."""

SHIM_NAME = "modeling_mla"


class MLAConfigMixin(PreTrainedConfig):
    """Config fields of a converted model, on top of the source family's own.

    The fields are those of `optimum_mla.core.geometry.MLAGeometry`. They hold for every layer unless `per_layer_config`
    (Transformers' own mechanism for layers that differ) says otherwise; a layer whose `attention_form` is `source`
    keeps the attention of the source model. `num_key_value_heads` and `head_dim` stay the source's.
    """

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        prefix = type(self).__name__.removesuffix("MLAConfig")
        # Lets `trust_remote_code=True` load the folder where optimum-mla is installed but was not imported.
        self.auto_map = {
            "AutoConfig": f"{SHIM_NAME}.{prefix}MLAConfig",
            "AutoModel": f"{SHIM_NAME}.{prefix}MLAModel",
            "AutoModelForCausalLM": f"{SHIM_NAME}.{prefix}MLAForCausalLM",
        }

    @property
    def qk_head_dim(self) -> int:
        """Return n + R; Transformers takes it as the sign of latent attention when it sizes static caches."""
        layer = self.per_layer_config[0]
        return (layer.qk_nope_head_dim + layer.qk_rope_head_dim) or layer.head_dim


class LatentInitialization(PreTrainedModel):
    """Initializes what the source family does not know."""

    spec: ClassVar[AttentionSpec]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DecoupledLatentAttention):
            init.copy_(module.rope_pairs, default_rope_pairs(module.geometry))

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a converted model; arguments and results are those of Transformers' `from_pretrained`."""
        loaded = super().from_pretrained(*args, **kwargs)
        keep_storable(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the model as Transformers does, with the few lines that `auto_map` points at.

        Whether the head is tied is read from the weights, because merged adapters may have given it weights of its own
        (`modules_to_save`), which a config that says otherwise would leave out of the checkpoint.
        """
        if self.get_output_embeddings() is not None:
            self.config.tie_word_embeddings = is_tied(self)
        if getattr(self, "hf_quantizer", None) is not None:
            # Undoing what loading did to the names is not written for bitsandbytes, and these models need none of it.
            kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, *args, **kwargs)
        prefix = self.spec.class_prefix
        names = [f"{prefix}MLA{kind}" for kind in ("Config", "Model", "ForCausalLM")]
        shim = "".join(f"from optimum_mla.models import {name} as {name}\n" for name in names)
        (Path(save_directory) / f"{SHIM_NAME}.py").write_text(shim, encoding="utf-8")


class MLAModelMixin(LatentInitialization):
    """A source family's base model whose converted layers run latent attention."""

    @staticmethod
    def recorders(source: dict[str, Any], source_attention: type[nn.Module]) -> dict[str, Any]:
        """Return what `output_attentions` and `output_hidden_states` record: attentions are those of both kinds."""
        return {**source, "attentions": [LatentAttention, source_attention]}

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        spec, rotary = self.spec, getattr(self, self.spec.rotary)
        for index, layer in enumerate(getattr(self, spec.layers)):
            layer_config = config.per_layer_config[index]
            if layer_config.attention_form != "source":
                attention = build_attention(spec, config, index, rotary)
                setattr(layer, spec.attention, attention)
        self.post_init()


def base_forward(source_base: type[PreTrainedModel]) -> Callable[..., Any]:
    """Return the `forward` of a converted base model, with the signature of the source's.

    It makes a `LatentCache` where a cache is wanted and none was given, takes the cache by every known name, and
    refuses keywords that nothing would use.

    Args:
        source_base: The base model class of the source family.
    """
    source_forward = source_base.forward
    name, position = cache_name(source_forward), cache_position(source_forward) - 1  # `self` is not among `args`
    known = forward_keywords(source_forward)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = renamed_cache(kwargs, name, f"{type(self).__name__}.forward")
        check_keywords(kwargs, known, type(self).__name__, self.config._attn_implementation)
        use_cache = kwargs.get("use_cache")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and not self.training and len(args) <= position and kwargs.get(name) is None:
            kwargs[name] = latent_cache(self.spec, self.config)
        elif kwargs.get(name) is not None:
            cache = kwargs[name]
            require_cache(cache)
            if not isinstance(cache, LatentCache) and rotates_cached_keys(self):
                check_given_positions(kwargs.get("position_ids"), kwargs.get("attention_mask"), cache.get_seq_length())
        return source_forward(self, *args, **kwargs)

    forward.__doc__ = source_forward.__doc__
    # Tools read the main input's name, and which columns a dataset may have, from the signature.
    forward.__signature__ = inspect.signature(source_forward)  # type: ignore[attr-defined]
    return forward


class MLAForCausalLMMixin(LatentInitialization):
    """A source family's language model on top of its `MLAModelMixin` base."""

    base_class: ClassVar[type[PreTrainedModel]]

    def __init__(self, config: Any) -> None:
        # The source class builds its own base model, which gives way to ours. Loading and converting build on the
        # meta device, where this costs nothing.
        checkpointing = getattr(config, "gradient_checkpointing", None)
        super().__init__(config)
        setattr(self, self.spec.base, self.base_class(config))
        if checkpointing is not None:
            config.gradient_checkpointing = checkpointing  # the source's `__init__` has taken it out of the config
        self.post_init()

    @property
    def geometry(self) -> ModelGeometry:
        """Return the shapes of all attention layers."""
        return model_geometry(self.spec, self.config)

    def make_cache(self, offloading: bool = False, **settings: Any) -> LatentCache:
        """Return an empty cache for this model, for example to be kept over the turns of a conversation.

        Args:
            offloading: Keep the layers on the CPU between their turns (CUDA only).
            settings: Fields of `CacheSettings` that differ from the model's own.
        """
        return latent_cache(self.spec, self.config, offloading, **settings)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse continuous batching, which `generate_batch` and `transformers serve --continuous-batching` begin here.

        Raises:
            UnsupportedModelError: Always; its paged cache holds keys and values of heads, not latents.
        """
        raise UnsupportedModelError(
            "generate_batch: the paged cache of continuous batching holds keys and values of heads, not latents. "
            "Use generate with a batch of prompts."
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Prepare the cache as Transformers does, but a `LatentCache` where none, or a quantized one, is chosen.

        Transformers' own quantized cache codes the whole cache again at every flush and takes no tensor without width.
        """
        quantized = generation_config.cache_implementation == "quantized"
        chosen = generation_config.cache_implementation is not None or generation_config.use_cache is False
        if model_kwargs.get(CACHE_ARGUMENT) is not None or (chosen and not quantized):
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
            return
        settings = quantized_settings(generation_config.cache_config or {}) if quantized else {}
        model_kwargs[CACHE_ARGUMENT] = cache = self.make_cache(**settings)
        if generation_config.is_assistant:
            cache.activate_past_recording()


def rotates_cached_keys(model: nn.Module) -> bool:
    """Return whether a layer rotates keys after they are read from the cache, for which it needs their positions."""
    return any(isinstance(m, LatentAttention) and m.needs_cached_positions() for m in model.modules())


def quantized_settings(cache_config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `CacheSettings` for the `cache_config` of Transformers' quantized cache.

    Raises:
        InvalidValueError: The `cache_config` has an entry that a latent cache does not know.
    """
    names = {
        "backend": "backend",
        "nbits": "bits",
        "q_group_size": "group_size",
        "residual_length": "residual_length",
    }
    if unknown := [name for name in cache_config if name not in names]:
        remedy = "Latents are always coded token by token." if "axis" in unknown[0] else "Leave it out."
        raise InvalidValueError("cache_config", unknown[0], ", ".join(names), remedy)
    return {"bits": 4, "backend": "quanto", **{names[name]: value for name, value in cache_config.items()}}


def is_tied(model: PreTrainedModel) -> bool:
    """Return whether the language-model head is the token embedding itself."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", None)


def keep_storable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU, after which they would be saved wrong.

    Its 4-bit layers do so at their first call, where the CPU has bfloat16 instructions.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  (no field of `nn.Module`)


def build_attention(
    spec: AttentionSpec, config: Any, layer: int, rotary: nn.Module, geometry: MLAGeometry | None = None
) -> LatentAttention:
    """Return the latent attention module of one converted layer, with the weights that `torch.nn` starts from.

    The module keeps the model's config, not its layer's: `set_attn_implementation` changes the former only.

    Args:
        geometry: Shape of the layer; None reads it from the config.
    """
    geometry = geometry or spec.geometry(config.per_layer_config[layer])
    window = sliding_window(config, layer)
    return ATTENTION_FORMS[geometry.attention_form](config, geometry, layer, rotary, window)


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


def quantizable_layers(spec: AttentionSpec, config: Any) -> list[int]:
    """Return the indices of the layers whose cache is a `LatentLayer`."""
    layers = model_geometry(spec, config).layers
    return [
        index
        for index, geometry in enumerate(layers)
        if geometry.attention_form != "source" and sliding_window(config, index) is None
    ]


def model_geometry(spec: AttentionSpec, config: Any) -> ModelGeometry:
    """Return the shapes of all attention layers of a source or converted model's config."""
    layers: tuple[MLAGeometry, ...] = tuple(spec.geometry(layer) for layer in config.per_layer_config)
    return ModelGeometry(layers)
