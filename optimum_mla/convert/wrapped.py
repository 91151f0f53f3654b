"""Conversions of language models, by themselves or inside a wrapper such as a model that reads images."""

from __future__ import annotations

from typing import TypeAlias

from torch.fx import GraphModule
from transformers import PreTrainedModel

from optimum_mla.convert.codec import fit_codec
from optimum_mla.convert.reverse import reverse_model
from optimum_mla.convert.run import Run
from optimum_mla.core.errors import UnsupportedModelError
from optimum_mla.methods.base import MLATransformation
from optimum_mla.models.coded import with_codec, without_codec
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
    if method.coded:
        return without_codec(model) if reverse else coded(method, model)
    language = language_of(model)
    done = reverse_model(method, language) if reverse else Run(method, language).convert()
    if language is model:
        return done
    return rewrapped(model, done)  # type: ignore[arg-type]


def coded(method: MLATransformation, model: Model) -> PreTrainedModel:
    """Give a model a codec for a budget of bytes, in place, and return it.

    Args:
        method: The transformation, with its budget and its calibration.
        model: A causal language model.

    Raises:
        UnsupportedModelError: It is a graph, or a wrapper around a language model.
    """
    if not isinstance(model, PreTrainedModel) or wrapper_of(model.config) is not None:
        raise UnsupportedModelError(
            f"kv_cache_budget: got a {type(model).__name__}, allowed: a causal language model of Transformers. Give "
            "kv_cache_ratio for graphs, and for models that hold a language model."
        )
    calibration, budget = method.calibration, method.budget.kv_cache_budget
    if calibration is None or budget is None:
        raise RuntimeError("a budget of bytes without calibration")
    return with_codec(model, fit_codec(model, calibration, budget, layers=method.layers))
