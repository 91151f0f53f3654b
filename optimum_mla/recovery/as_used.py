"""Training of a model with a codec as it is used: a prompt goes into the cache, and the loss is on what follows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_mla.cache.codec_layer import ExactTokens
from optimum_mla.core.errors import InvalidValueError
from optimum_mla.recovery.distill import DistillationTrainer
from optimum_mla.recovery.losses import IGNORED
from optimum_mla.recovery.recipe import Recipe
from optimum_mla.stack import cache_argument

PLAIN = "Train the model as any other, with its folder as it is, and then run mla-calibrate --refit."


def check_as_used(recipe: Recipe, training: dict[str, Any]) -> None:
    """Refuse what cannot be trained through a cache of codes.

    Raises:
        InvalidValueError: An option does not go with a codec.
    """
    if recipe.objective != "distill":
        raise InvalidValueError("objective", recipe.objective, "distill for a model with a codec", PLAIN)
    if recipe.stage1 != "none":
        raise InvalidValueError("stage1", recipe.stage1, "none for a model with a codec")
    for name in ("gradient_checkpointing", "fsdp", "deepspeed"):
        if training.get(name):
            remedy = "Transformers drops the cache with it." if name == "gradient_checkpointing" else PLAIN
            raise InvalidValueError(name, training[name], "none for a model with a codec", remedy)


def check_prompt(name: str, length: int, exact: ExactTokens) -> None:
    """Refuse rows so short that half of one, as a prompt, leaves no codes in the cache.

    Raises:
        InvalidValueError: The field `name` has such a `length` in tokens.
    """
    if not exact.coded(length // 2):
        least = 2 * (exact.recent + exact.together)
        raise InvalidValueError(name, length, f"{least} or more, so that half of a row is a prompt with codes")


class AsUsedTrainer(DistillationTrainer):
    """Distils into a model that reads the first half of each row from its coded cache.

    Gradients flow through the second half alone: what is in the cache is given.

    Raises:
        InvalidValueError: The model is sharded, or one process has several GPUs, over which no cache can be split.
    """

    def __init__(self, model: Any, teacher: PreTrainedModel, **options: Any) -> None:
        super().__init__(model, teacher, **options)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise InvalidValueError("fsdp", "FSDP or DeepSpeed", "none for a model with a codec", PLAIN)
        if self.args.n_gpu > 1:
            remedy = "Start it by torchrun with a process for each, or show it one by CUDA_VISIBLE_DEVICES."
            raise InvalidValueError("device", f"{self.args.n_gpu} GPUs in one process", "one GPU a process", remedy)

    def _hidden_states(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        """Return the hidden states of the student after its last norm, [B, L, d], with zeros in the first half."""
        cached = self.accelerator.unwrap_model(model)
        ids = inputs["input_ids"]
        first, second = ids[:, : ids.shape[1] // 2], ids[:, ids.shape[1] // 2 :]
        given = {**cache_argument(cached, cached.make_cache()), "use_cache": True}
        nothing = torch.empty(0, dtype=torch.long, device=ids.device)
        training = model.training
        model.eval()  # A prompt is read without dropout.
        with torch.no_grad():
            model(input_ids=first, **given, logits_to_keep=nothing)
        model.train(training)
        # Autocast keeps the weights that it has cast, and these have no gradients.
        torch.clear_autocast_cache()
        output = model(input_ids=second, **given, output_hidden_states=True, logits_to_keep=nothing)
        last = output.hidden_states[-1]
        return (torch.cat([last.new_zeros(*first.shape, last.shape[-1]), last], dim=1),)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of the second halves of a batch, as `Trainer` expects it."""
        labels = inputs["labels"].clone()
        # The state before the first token of the second half is one of the prompt's.
        labels[:, : labels.shape[1] // 2 + 1] = IGNORED
        return super().compute_loss(model, {**inputs, "labels": labels}, return_outputs, num_items_in_batch)
