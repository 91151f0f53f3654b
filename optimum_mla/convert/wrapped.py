"""Conversions of language models, by themselves or inside a wrapper such as a model that reads images."""

from __future__ import annotations

from typing import TypeAlias

from torch.fx import GraphModule
from transformers import PreTrainedModel

from optimum_mla.convert.reverse import reverse_model
from optimum_mla.convert.run import Run
from optimum_mla.methods.base import MLATransformation
from optimum_mla.models.wrappers import language_model, rewrapped, wrapper_of

Model: TypeAlias = PreTrainedModel | GraphModule


def language_of(model: Model) -> Model:
    """Return what is converted of a model: the language model inside a wrapper, or the model itself."""
    wrapped = isinstance(model, PreTrainedModel) and wrapper_of(model.config) is not None
    return language_model(model) if wrapped else model  # type: ignore[arg-type]


def converted(method: MLATransformation, model: Model, reverse: bool = False) -> Model:
    """Convert a model in place and return it; of a wrapper, its language model.

    Args:
        method: The transformation, with its calibration.
        model: A causal language model, one that `optimum_mla.trace` returned, or one of
            `optimum_mla.models.wrappers.WRAPPERS`.
        reverse: Whether to undo the conversion instead.
    """
    language = language_of(model)
    done = reverse_model(method, language) if reverse else Run(method, language).convert()
    if language is model:
        return done
    return rewrapped(model, done)  # type: ignore[arg-type]
