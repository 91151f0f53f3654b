"""The base classes of the converted models of all families: their construction, forward, generation and saving."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from textwrap import indent
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from optimum_mla.cache import LatentCache
from optimum_mla.core.errors import UnsupportedModelError
from optimum_mla.core.geometry import ModelGeometry
from optimum_mla.families.guess import spec_source
from optimum_mla.families.spec import AttentionSpec
from optimum_mla.models.adapters import warn_of_unmatched
from optimum_mla.models.config import SHIM_NAME
from optimum_mla.models.layers import build_attention, latent_cache, model_geometry, quantized_settings
from optimum_mla.nn import DecoupledLatentAttention, LatentAttention
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

SHIM = '''\
"""Imports the classes of this model from optimum-mla, and does nothing else.

Where `import optimum_mla` stands before `from_pretrained`, this file is not run, and nothing has to be trusted. With
`trust_remote_code=True` it is run instead.
"""

# Transformers checks the imports outside of such blocks by itself, and would say less.
try:
{imports}
except ImportError as error:
    raise ImportError(
        f"The attention of this model was converted by optimum-mla, which is missing or too old here ({{error}}). "
        "Run `pip install --upgrade optimum-mla`, and write `import optimum_mla` before `from_pretrained`."
    ) from error
'''
"""The module that `auto_map` points at, without its imports."""


class LatentCheckpoint(PreTrainedModel):
    """Saves a model so that it is loaded as it was."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the model as Transformers does, with each weight under the name that it has in the model.

        `save_original_format=True` writes the names and shapes of the source's checkpoint instead, where weights allow
        that; quantized ones do not. Both are read.

        Whether the head is tied is read from the weights, because merged adapters may have given it weights of its own
        (`modules_to_save`), which a config that says otherwise would leave out of the checkpoint.
        """
        if self.get_output_embeddings() is not None:
            for config in (self.config, self.config.get_text_config()):
                config.tie_word_embeddings = is_tied(self)
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, *args, **kwargs)


class LatentInitialization(LatentCheckpoint):
    """Initializes what the source family does not know."""

    spec: ClassVar[AttentionSpec]
    built_in: ClassVar[bool]
    """Whether importing `optimum_mla` registers the family."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DecoupledLatentAttention):
            init.copy_(module.rope_pairs, default_rope_pairs(module.geometry))

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing: Transformers would save this package's module with the model, in the place of the few lines."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a converted model; arguments and results are those of Transformers' `from_pretrained`."""
        loaded = super().from_pretrained(*args, **kwargs)
        keep_storable(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the model as `LatentCheckpoint` does, with the few lines that `auto_map` points at."""
        super().save_pretrained(save_directory, *args, **kwargs)
        prefix = self.spec.class_prefix
        names = [f"{prefix}MLA{kind}" for kind in ("Config", "Model", "ForCausalLM")]
        lines = [f"from optimum_mla.models import {name} as {name}" for name in names]
        if not self.built_in:
            known = "from optimum_mla import AttentionSpec, register_family"
            lines = [known, "", f"register_family({spec_source(self.spec)})", "", *lines]
        shim = SHIM.format(imports=indent("\n".join(lines), "    "))
        (Path(save_directory) / f"{SHIM_NAME}.py").write_text(shim, encoding="utf-8")


class MLAModelMixin(LatentInitialization):
    """A source family's base model whose converted layers run latent attention."""

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
    """
    source_forward = source_base.forward
    name, position = cache_name(source_forward), cache_position(source_forward) - 1  # `self` is not among `args`
    known = forward_keywords(source_forward)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Transformers' pipeline parallelism hands further keywords on as one argument of this name.
        kwargs = renamed_cache({**kwargs.pop("kwargs", {}), **kwargs}, name, f"{type(self).__name__}.forward")
        # A model around this one may hand on what it was not given.
        kwargs = {name: value for name, value in kwargs.items() if value is not None or name in known}
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


class LatentGeneration(PreTrainedModel):
    """Makes caches for a model whose language model has latent attention, and gives them to `generate`."""

    spec: Any
    """The `AttentionSpec` of the language model."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. PEFT sets `peft_config` on a model that it has adapted; targets are checked then."""
        super().__setattr__(name, value)
        if name == "peft_config":
            warn_of_unmatched(self, value, self.spec.attention)

    @property
    def geometry(self) -> ModelGeometry:
        """Return the shapes of all attention layers."""
        return model_geometry(self.spec, self.config.get_text_config())

    def make_cache(self, offloading: bool = False, **settings: Any) -> LatentCache:
        """Return an empty cache for this model, for example to be kept over the turns of a conversation.

        Args:
            offloading: Keep the layers on the CPU between their turns (CUDA only).
            settings: Fields of `CacheSettings` that differ from the model's own.
        """
        return latent_cache(self.spec, self.config.get_text_config(), offloading, **settings)

    @property
    def init_continuous_batching(self) -> Any:
        """Deny that the model has this method, so that `transformers serve --continuous-batching` goes without it.

        Raises:
            AttributeError: Always; the paged cache of continuous batching holds keys and values of heads, not latents.
        """
        raise AttributeError("init_continuous_batching")

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse continuous batching.

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


class MLAForCausalLMMixin(LatentGeneration, LatentInitialization):
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


def rotates_cached_keys(model: nn.Module) -> bool:
    """Return whether a layer rotates keys after they are read from the cache, for which it needs their positions."""
    return any(isinstance(m, LatentAttention) and m.needs_cached_positions() for m in model.modules())


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
