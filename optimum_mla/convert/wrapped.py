"""Conversions of language models, by themselves or inside a wrapper."""

from __future__ import annotations

from torch.fx import GraphModule
from transformers import PreTrainedModel

from optimum_mla.convert.run import Run
from optimum_mla.methods.base import MLATransformation
from optimum_mla.models.wrappers import language_model, rewrapped, wrapper_of


def convert_model(method: MLATransformation, model: PreTrainedModel | GraphModule) -> PreTrainedModel | GraphModule:
    """Convert a model in place and return it; of a wrapper, such as a model that reads images, its language model.

    Args:
        method: The transformation, with its calibration.
        model: A causal language model, one that `optimum_mla.trace` returned, or one of
            `optimum_mla.models.wrappers.WRAPPERS`.
    """
    if not isinstance(model, PreTrainedModel) or wrapper_of(model.config) is None:
        return Run(method, model).convert()
    language = language_model(model)
    Run(method, language).convert()
    return rewrapped(model, language)
