"""Recovering quality after a conversion: which parameters train, against what loss, on what data.

The training loops are Transformers', TRL's and PEFT's.
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
