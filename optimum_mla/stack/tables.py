"""The tables in which Transformers looks classes up by name."""

from __future__ import annotations

from transformers.models.auto import modeling_auto


def enter_class_names(model_type: str, base: str, causal_lm: str) -> None:
    """Enter a family of converted models where Transformers looks up names of classes.

    The Auto classes know registered classes by their configs. `Trainer` (the loss with label smoothing), pipelines,
    `transformers serve` and model cards look names up in these tables instead.

    Args:
        model_type: The family's `model_type`.
        base: The name of its base model class.
        causal_lm: The name of its causal language model class.
    """
    modeling_auto.MODEL_MAPPING_NAMES[model_type] = base
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] = causal_lm
