"""Models around a language model, such as those that read images, as data."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Wrapper:
    """A kind of model that holds a language model without its head, and the head beside it.

    Attributes:
        model_type: Its `model_type` in Transformers; converted ones are `<model_type>_mla`.
        class_prefix: What its class names in Transformers begin with.
        inner: Attribute name of the language model in the base model.
    """

    model_type: str
    class_prefix: str
    inner: str = "language_model"

    @property
    def classes(self) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
        """Return its config class and its model class in Transformers."""
        modeling = import_module(f"transformers.models.{self.model_type}.modeling_{self.model_type}")
        prefix = self.class_prefix
        return getattr(transformers, f"{prefix}Config"), getattr(modeling, f"{prefix}ForConditionalGeneration")


WRAPPERS = (
    Wrapper("gemma3", "Gemma3"),
    Wrapper("idefics3", "Idefics3", "text_model"),
    Wrapper("internvl", "InternVL"),
    Wrapper("llava", "Llava"),
    Wrapper("mistral3", "Mistral3"),
    Wrapper("smolvlm", "SmolVLM", "text_model"),
)
"""The wrappers whose base model makes its language model by the Auto classes, so that it may be a converted one."""

TEXT_ONLY = {"qwen2_vl_text": "Qwen2", "qwen2_5_vl_text": "Qwen2", "qwen3_vl_text": "Qwen3"}
"""Language models that rotate by three positions of a token, and what they are on text, where the three are equal."""
IMAGE_ROPE = ("mrope_section", "mrope_interleaved")
"""Entries of `rope_parameters` that say which dims rotate by which of the three positions."""


def wrapper_of(config: Any) -> Wrapper | None:
    """Return the kind of a wrapper by its config, converted or not, or None if it is none of `WRAPPERS`."""
    model_type = str(getattr(config, "model_type", None)).removesuffix("_mla")
    return next((wrapper for wrapper in WRAPPERS if wrapper.model_type == model_type), None)
