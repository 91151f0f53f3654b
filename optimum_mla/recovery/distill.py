"""Trainers that learn from a teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_mla.core.errors import InvalidValueError
from optimum_mla.core.number_checks import check_finite
from optimum_mla.models.family_table import FAMILIES
from optimum_mla.recovery.held_out import HeldOutTrainer
from optimum_mla.recovery.losses import Head, distillation_loss, hidden_state_loss

HOTTEST = 1000.0
"""Temperatures are below this, because the loss is multiplied by their square."""


class TeacherTrainer(HeldOutTrainer):
    """A `HeldOutTrainer` with a frozen teacher beside the model, a causal language model on the same vocabulary."""

    def __init__(self, model: Any, teacher: PreTrainedModel, **options: Any) -> None:
        super().__init__(model=model, **options)
        # The losses here are means over a batch, so the base class has to average over accumulated batches.
        self.model_accepts_loss_kwargs = False
        self.teacher = teacher.requires_grad_(False).eval()
        if getattr(teacher, "hf_device_map", None) is None:
            self.teacher.to(self.args.device)

    @torch.no_grad()
    def _taught(self, inputs: dict[str, Any], **options: Any) -> Any:
        """Return the output of the teacher's base model on a batch, without computing logits."""
        batch = {name: value for name, value in inputs.items() if name != "labels"}
        return self.teacher.base_model(**batch, use_cache=False, **options)

    def _hidden_states(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        """Return the hidden states of the student, the last one after the final norm.

        The model's own `forward` is called, because wrappers for data-parallel and sharded training depend on it. It
        computes the logits of no token.
        """
        batch = {name: value for name, value in inputs.items() if name != "labels"}
        nothing = torch.empty(0, dtype=torch.long, device=inputs["input_ids"].device)
        return model(**batch, use_cache=False, output_hidden_states=True, logits_to_keep=nothing).hidden_states


def check_loss(kl_weight: float, ce_weight: float, temperature: float) -> None:
    """Refuse weights of the loss that are negative or all zero, and a temperature that is not above zero."""
    check_finite("kl_weight", kl_weight)
    check_finite("ce_weight", ce_weight)
    if kl_weight == ce_weight == 0:
        raise InvalidValueError("kl_weight", kl_weight, "numbers above 0 where ce_weight is 0")
    check_finite("temperature", temperature, above=True, below=HOTTEST)


def logits_of(model: Any) -> Head:
    """Return what makes a model's logits of the states after its last norm, with the factor or cap that it has."""
    head: Any = model.get_output_embeddings()
    family = next((one for one in FAMILIES.values() if model.config.model_type in one.model_types), None)
    return head if family is None else lambda states: family.spec.logits(model.config, head(states))


class DistillationTrainer(TeacherTrainer):
    """Minimizes the KL divergence from the teacher's next-token distribution, mixed with cross-entropy.

    The weights and the temperature are those of `distillation_loss`.
    """

    def __init__(
        self,
        model: Any,
        teacher: PreTrainedModel,
        kl_weight: float = 1.0,
        ce_weight: float = 0.0,
        temperature: float = 1.0,
        **options: Any,
    ) -> None:
        check_loss(kl_weight, ce_weight, temperature)
        super().__init__(model, teacher, **options)
        self.weights = {"kl_weight": kl_weight, "ce_weight": ce_weight, "temperature": temperature}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch, as `Trainer` expects it."""
        student = self.accelerator.unwrap_model(model)
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            hidden = self._hidden_states(model, inputs)[-1]
            found = distillation_loss(
                hidden,
                logits_of(student),
                self._taught(inputs).last_hidden_state,
                logits_of(self.teacher),
                inputs["labels"],
                **self.weights,
            )
        return (found.loss, {"loss": found.loss, "kl": found.kl, "ce": found.ce}) if return_outputs else found.loss


class LayerwiseTrainer(TeacherTrainer):
    """Brings the output of every layer close to the teacher's, as a first stage that needs no logits.

    The teacher must have as many layers as the model, of the same width.
    """

    def __init__(self, model: Any, teacher: PreTrainedModel, **options: Any) -> None:
        for name in ("num_hidden_layers", "hidden_size"):
            given, wanted = getattr(teacher.config, name), getattr(model.config, name)
            if given != wanted:
                raise InvalidValueError(
                    "stage1",
                    "layerwise",
                    f"teachers with {name} {wanted} ({given} here)",
                    "Train without the layerwise stage.",
                )
        super().__init__(model, teacher, **options)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch, as `Trainer` expects it."""
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            given = self._hidden_states(model, inputs)[1:]
            loss = hidden_state_loss(given, self._taught(inputs, output_hidden_states=True).hidden_states[1:])
        return (loss, {"loss": loss}) if return_outputs else loss
