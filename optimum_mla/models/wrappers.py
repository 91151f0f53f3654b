"""Models around a language model, such as those that read images, whose language model is converted inside them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from optimum_mla.core.errors import UnsupportedModelError
from optimum_mla.families.spec import AttentionSpec
from optimum_mla.families.wrappers import IMAGE_ROPE, TEXT_ONLY, WRAPPERS, Wrapper, wrapper_of
from optimum_mla.models.classes import LatentCheckpoint, LatentGeneration, is_tied
from optimum_mla.models.family_table import family_of, is_converted
from optimum_mla.stack import share_checkpoint_names

NOT_CARRIED = ("model_type", "architectures", "auto_map", "transformers_version", "text_config")
"""Keys of a wrapper's config that the converted one does not take over."""


class WrapperMLAConfigMixin(PreTrainedConfig):
    """Config of a wrapper whose `text_config` is that of a converted language model."""

    text_config: Any

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            # The classes of some wrappers would make a config of the source family of it.
            self.text_config = AutoConfig.for_model(**self.text_config)
        super().__post_init__(**kwargs)


class WrapperMLAMixin(LatentGeneration, LatentCheckpoint):
    """A wrapper around a converted language model."""

    @property
    def spec(self) -> AttentionSpec:
        """Return the description of the language model's family."""
        return family_of(self.config.text_config).spec


def _registered(wrapper: Wrapper) -> type[PreTrainedModel]:
    """Return the class of converted wrappers of one kind, registered with the Auto classes together with its config."""
    source_config, source_model = wrapper.classes
    home, prefix = __name__, wrapper.class_prefix
    config: Any = type(
        f"{prefix}WrapperMLAConfig",
        (WrapperMLAConfigMixin, source_config),
        {
            "__module__": home,
            "__doc__": f"Config of a {prefix} model with latent attention in its language model.",
            "model_type": f"{wrapper.model_type}_mla",
        },
    )
    model = type(
        f"{prefix}MLAForConditionalGeneration",
        (WrapperMLAMixin, source_model),
        {
            "__module__": home,
            "__doc__": f"{prefix}ForConditionalGeneration with latent attention in its language model.",
            "config_class": config,
        },
    )
    AutoConfig.register(config.model_type, config)
    AutoModelForImageTextToText.register(config, model)
    share_checkpoint_names(wrapper.model_type, config.model_type)
    share_checkpoint_names(source_model.__name__, model.__name__)
    globals().update({config.__name__: config, model.__name__: model})
    return model


_CONVERTED = {wrapper.model_type: _registered(wrapper) for wrapper in WRAPPERS}


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the language model of a wrapper as a causal language model of its own, which shares its weights.

    Those in `TEXT_ONLY` become models of another family, which compute the same on text, but cannot go back into their
    wrapper.

    ```python
    whole = AutoModelForImageTextToText.from_pretrained("Qwen/Qwen2.5-VL-3B-Instruct")
    language_model(whole).save_pretrained("FOLDER")
    ```

    Raises:
        UnsupportedModelError: The model is no wrapper, or no causal language model is known for what it holds.
    """
    config = getattr(model.config, "text_config", None)
    if config is None:
        raise UnsupportedModelError(f"model: {type(model).__name__} is no wrapper around a language model.")
    wrapper = wrapper_of(model.config)
    inner: Any = model.base_model.get_submodule("language_model" if wrapper is None else wrapper.inner)
    if config.model_type in TEXT_ONLY:
        return _text_only(model, inner, TEXT_ONLY[config.model_type])
    family, config = family_of(config), copy.deepcopy(config)
    config.tie_word_embeddings = is_tied(model)
    config.name_or_path = model.config.name_or_path
    with torch.device("meta"):
        language: Any = (family.model if is_converted(config) else family.source_model)(config)
    setattr(language, family.spec.base, inner)
    setattr(language, family.spec.head, model.get_output_embeddings())
    language.generation_config = model.generation_config
    return language.train(model.training)  # type: ignore[no-any-return]


def _text_only(model: PreTrainedModel, inner: Any, prefix: str) -> PreTrainedModel:
    """Return a model of another family with the weights of a language model that computes the same on text."""
    fields = {name: value for name, value in inner.config.to_dict().items() if name not in NOT_CARRIED}
    rope = {name: value for name, value in fields.pop("rope_parameters").items() if name not in IMAGE_ROPE}
    rope["rope_type"] = "default" if rope.get("rope_type") == "mrope" else rope["rope_type"]
    tied = is_tied(model)
    config = getattr(transformers, f"{prefix}Config")(**{**fields, "tie_word_embeddings": tied}, rope_parameters=rope)
    config._attn_implementation = inner.config._attn_implementation
    with torch.device("meta"):
        language: Any = getattr(transformers, f"{prefix}ForCausalLM")(config)
    weights = {f"model.{name}": tensor for name, tensor in inner.state_dict(keep_vars=True).items()}
    language.load_state_dict({**weights, "lm_head.weight": model.get_output_embeddings().weight}, assign=True)
    language.model.rotary_emb = type(language.model.rotary_emb)(config).to(model.device)
    if tied:
        language.tie_weights()
    language.generation_config = model.generation_config
    return language.train(model.training)  # type: ignore[no-any-return]


def rewrapped(model: PreTrainedModel, language: PreTrainedModel) -> PreTrainedModel:
    """Put a language model that was converted, or is the source's again, into its wrapper in place; return the wrapper.

    The language model is what `language_model` returned for the wrapper, which is one of `WRAPPERS`.
    """
    wrapper = wrapper_of(model.config)
    if wrapper is None:
        raise UnsupportedModelError(f"model: {type(model).__name__} cannot hold a converted language model.")
    cls: Any = _CONVERTED[wrapper.model_type] if is_converted(language.config) else wrapper.classes[1]
    old, spec = model.config, family_of(language.config).spec
    carried = {name: value for name, value in old.to_dict().items() if name not in NOT_CARRIED}
    config: Any = cls.config_class(**carried, text_config=language.config, architectures=[cls.__name__])
    config.name_or_path, config._attn_implementation = old.name_or_path, old._attn_implementation
    setattr(model.base_model, wrapper.inner, language.get_submodule(spec.base))
    model.set_output_embeddings(language.get_submodule(spec.head))
    for module in (model, model.base_model):
        module.config = config
    model.__class__ = cls
    return model
