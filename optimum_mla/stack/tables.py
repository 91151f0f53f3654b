"""The tables in which Transformers looks classes up by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import transformers
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto

SERVER = "transformers.cli.serving.model_manager"
"""The module with which `transformers serve` loads models."""


def enter_class_names(model_type: str, base: type, causal_lm: type) -> None:
    """Enter a family of converted models where Transformers looks up names of classes.

    The Auto classes know registered classes by their configs. `Trainer` (the loss with label smoothing), pipelines and
    model cards look names up in these tables instead, and `transformers serve` takes the class that a config names
    from the package itself.

    Args:
        model_type: The family's `model_type`.
        base: Its base model class.
        causal_lm: Its causal language model class.
    """
    modeling_auto.MODEL_MAPPING_NAMES[model_type] = base.__name__
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] = causal_lm.__name__
    for package in _packages():
        for made in (base, causal_lm):
            setattr(package, made.__name__, made)


def share_checkpoint_names(source: str, converted: str) -> None:
    """Let converted models be read from checkpoints that name their weights as those of the source's kind do.

    Such checkpoints may name a head `language_model.lm_head` that the model has as `lm_head`, or hold each expert's
    matrices alone where the model has them in one tensor. Transformers looks up what it does to them on loading, and
    undoes on saving, by the names of model types and of classes.

    Args:
        source: A `model_type` of Transformers, or the name of one of its classes.
        converted: The `model_type`, or the class name, of its converted models.
    """
    known = get_checkpoint_conversion_mapping(source)
    if known is not None:
        register_checkpoint_conversion_mapping(converted, known, overwrite=True)


def _packages() -> Iterator[ModuleType]:
    """Yield the modules called `transformers`.

    There may be several: Transformers executes its own `__init__` again when it first imports processors, and modules
    that imported the package before keep the module of the first time.
    """
    yield transformers
    yield sys.modules["transformers"]
    yield getattr(sys.modules.get(SERVER), "transformers", transformers)
