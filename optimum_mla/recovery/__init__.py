"""Recovery of quality after a conversion: the choice of parameters to train, the losses, and the training data.

The training loops are those of Transformers, TRL and PEFT.
"""

from optimum_mla.recovery.distill import DistillationTrainer, LayerwiseTrainer
from optimum_mla.recovery.losses import distillation_loss
from optimum_mla.recovery.parameters import TRAIN_CHOICES, kv_parameters, mla_lora_config, prepare

__all__ = [
    "TRAIN_CHOICES",
    "DistillationTrainer",
    "LayerwiseTrainer",
    "distillation_loss",
    "kv_parameters",
    "mla_lora_config",
    "prepare",
]
