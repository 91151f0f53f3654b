"""Direct preference optimization (Rafailov et al., arXiv 2305.18290), by TRL."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedModel

from optimum_mla.core.errors import MissingDependencyError


def dpo_trainer(
    model: Any, dataset: Any, tokenizer: Any, arguments: dict[str, Any], reference: PreTrainedModel | None = None
) -> Any:
    """Return TRL's `DPOTrainer`, whose reference is the model in its present state.

    Args:
        model: A model from `prepare`. If it has adapters, the reference is the model without them.
        dataset: Preference pairs from `preferences`.
        tokenizer: The tokenizer of the model; without a padding token it pads with the end-of-text token.
        arguments: Fields of TRL's `DPOConfig`.
        reference: A reference to take instead of a frozen copy of the model.

    Raises:
        MissingDependencyError: TRL is not installed.
    """
    try:
        from trl import DPOConfig, DPOTrainer
    except ImportError as error:
        raise MissingDependencyError("trl", "train", "train with DPO") from error
    if tokenizer.pad_token is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    adapters = hasattr(model, "disable_adapter")
    if reference is None and not adapters:
        reference = copy.deepcopy(model).requires_grad_(False).eval()
    configs = [one.config for one in (model, reference) if one is not None]
    origins = [config.auto_map for config in configs]
    try:
        for config in configs:
            config.auto_map = {}  # TRL reads the origin of remote code from it, which a registered class does not have
        return DPOTrainer(
            model=model,
            ref_model=reference,
            args=DPOConfig(**arguments),
            train_dataset=dataset,
            processing_class=tokenizer,
        )
    finally:
        for config, origin in zip(configs, origins, strict=True):
            config.auto_map = origin
