"""The recipe of a training, and the `TrainingArguments` that follow from it."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from optimum_mla.core.errors import InvalidValueError, MissingDependencyError
from optimum_mla.core.number_checks import LARGEST_COUNT, LARGEST_SEED, check_count, check_finite
from optimum_mla.core.suggestions import did_you_mean
from optimum_mla.recovery.distill import check_loss
from optimum_mla.recovery.optimizers import OPTIMIZERS
from optimum_mla.recovery.parameters import ADAPTERS, TRAIN_CHOICES

OBJECTIVES = ("distill", "sft", "dpo")
STAGES = ("none", "layerwise")
LEARNING_RATES = {"lora": 1e-3, "dora": 1e-3, "kv": 5e-4, "attention": 5e-4, "full": 3e-4}
"""Default learning rates by what trains, which the configs of the benchmarks take too."""
DPO_SHARE = 0.01
"""Factor of the default learning rates for DPO."""
SCHEDULE = "cosine"
MHA2MLA_SCHEDULE = "mha2mla"
"""The schedule of MHA2MLA (arXiv 2502.14837, section 4.1): linear warmup, constant, and a decay of 1 - sqrt."""
DECAY_SHARE = 0.1
"""Share of the steps over which that schedule decays."""
BATCH_SIZE = 8
WARMUP_SHARE = 0.05
LOGS, CHECKPOINTS = 50, 5
"""Default numbers of logged losses and of checkpoints over a training."""
COUNTS = {
    "per_device_train_batch_size": (1, LARGEST_COUNT),
    "per_device_eval_batch_size": (1, LARGEST_COUNT),
    "gradient_accumulation_steps": (1, LARGEST_COUNT),
    "dataloader_num_workers": (0, 1024),
    "seed": (0, LARGEST_SEED),
    "data_seed": (0, LARGEST_SEED),
}
"""Fields of `TrainingArguments` that are integers, with the smallest and the largest value of each."""
MOST_EPOCHS = 1e9
"""Numbers of epochs are below this, so that the steps can be counted."""
UNSET_BY_MINUS_ONE = ("max_steps", "local_rank")
"""Numbers among these fields for which -1 stands for no value."""
OURS = (
    *("output_dir", "do_train", "do_eval", "do_predict", "remove_unused_columns", "resume_from_checkpoint"),
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "metric_for_best_model", "greater_is_better"),
)
"""Fields of `TrainingArguments` that users cannot set."""


@dataclass(frozen=True)
class Recipe:
    """The settings of a training that recovers quality.

    Attributes:
        objective: `distill` (learn a teacher's distribution), `sft` (next-token cross-entropy) or `dpo` (preferences).
        train: What trains: `lora`, `dora`, `kv`, `attention` or `full`; see `optimum_mla.recovery.prepare`.
        layers: Layers that train, in the forms that a conversion accepts.
        lora_rank: Rank of the adapters.
        lora_alpha: Numerator of the scale of the adapters, alpha/rank; None takes twice the rank.
        lora_dropout: Dropout in the adapters.
        merge: Whether to merge the adapters, so that the result is a plain converted model.
        teacher: Hub id or folder of the teacher; None takes the model that the conversion started from.
        teacher_bits: Bits per weight of the teacher: 8 or 4 (quantized by bitsandbytes), or 16 for unquantized.
        kl_weight: Weight of the KL divergence from the teacher.
        ce_weight: Weight of the cross-entropy with the text in distillation.
        temperature: Softens both distributions in the KL divergence.
        optimizer: `adamw` (the one that `TrainingArguments.optim` names) or `muon` (Muon for matrices, AdamW for the
            rest).
        stage1: `layerwise` first brings the outputs of the layers close to the teacher's; `none` does not.
        stage1_share: Share of the steps that the layerwise stage takes.
        sequence_length: Tokens per row; None takes the shorter of 512 and the model's longest context.
        train_tokens: Largest number of training tokens to read; None reads all.
        streaming: Whether to read the data while training goes on.
        chat_template: Whether the data are chats, which the tokenizer's chat template renders.

    Raises:
        InvalidValueError: A value is out of range, or two options do not go together.
    """

    objective: str = "distill"
    train: str = "lora"
    layers: str = "all"
    lora_rank: int = 32
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    merge: bool = False
    teacher: str | None = None
    teacher_bits: int = 16
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    temperature: float = 1.0
    optimizer: str = "adamw"
    stage1: str = "none"
    stage1_share: float = 0.2
    sequence_length: int | None = None
    train_tokens: int | None = None
    streaming: bool = False
    chat_template: bool = False

    def __post_init__(self) -> None:
        for field, allowed in (
            ("objective", OBJECTIVES),
            ("train", TRAIN_CHOICES),
            ("optimizer", OPTIMIZERS),
            ("stage1", STAGES),
        ):
            value = getattr(self, field)
            if value not in allowed:
                raise InvalidValueError(field, value, ", ".join(allowed), did_you_mean(str(value), allowed))
        if self.teacher_bits not in (16, 8, 4):
            raise InvalidValueError("teacher_bits", self.teacher_bits, "16, 8, 4")
        check_count("lora_rank", self.lora_rank)
        if self.lora_alpha is not None:
            check_finite("lora_alpha", self.lora_alpha)
        check_finite("lora_dropout", self.lora_dropout, below=1)
        check_finite("stage1_share", self.stage1_share, above=True, below=1)
        if self.train_tokens is not None:
            check_count("train_tokens", self.train_tokens)
        if self.stage1 != "none" and self.objective == "dpo":
            raise InvalidValueError("stage1", self.stage1, "none with objective dpo")
        if self.optimizer != "adamw" and self.objective == "dpo":
            raise InvalidValueError("optimizer", self.optimizer, "adamw with objective dpo")
        if self.merge and self.train not in ADAPTERS:
            raise InvalidValueError("merge", True, f"only with train {' or '.join(ADAPTERS)}", "There are no adapters.")
        if self.objective == "distill":
            check_loss(self.kl_weight, self.ce_weight, self.temperature)
        if self.teacher is not None and not self.taught:
            raise InvalidValueError("teacher", self.teacher, "none with this objective", "Use objective distill.")

    @property
    def taught(self) -> bool:
        """Return whether a teacher takes part."""
        return self.objective == "distill" or self.stage1 != "none"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as the report saves them."""
        return asdict(self)


def check_installed(recipe: Recipe) -> None:
    """Check before any work that the packages which a recipe needs are installed.

    Raises:
        MissingDependencyError: A package is missing; the message names the extra that brings it.
    """
    needed = {
        "matplotlib": True,
        "peft": recipe.train in ADAPTERS,
        "trl": recipe.objective == "dpo",
        "bitsandbytes": recipe.teacher_bits != 16,
    }
    for package, used in needed.items():
        if used and find_spec(package) is None:
            extra = "bitsandbytes" if package == "bitsandbytes" else "train"
            raise MissingDependencyError(package, extra, "run this training")


def check_training(training: dict[str, Any]) -> None:
    """Check before anything is loaded that `TrainingArguments` has the given fields, and that numbers are possible.

    Raises:
        InvalidValueError: A name is unknown or cannot be set by users, or a value has the wrong type or is negative,
            nan or infinite.
    """
    from transformers import TrainingArguments

    known = {field.name: field.type for field in fields(TrainingArguments) if field.name not in OURS}
    for name, value in training.items():
        if name not in known:
            allowed = "fields of transformers.TrainingArguments"
            raise InvalidValueError(name, value, allowed, did_you_mean(name, known))
        kind = known[name]
        if kind in (int, float, bool) and not isinstance(value, int | float):
            raise InvalidValueError(name, value, f"a {kind.__name__}")  # type: ignore[union-attr]
        if name == "max_steps" and value != -1:  # -1 stands for a number of epochs
            check_count(name, value)
        elif name in COUNTS:
            check_count(name, value, *COUNTS[name])
        elif name not in UNSET_BY_MINUS_ONE and isinstance(value, int | float) and not isinstance(value, bool):
            check_finite(name, value, below=MOST_EPOCHS if name == "num_train_epochs" else math.inf)


def training_arguments(
    recipe: Recipe,
    training: dict[str, Any],
    folder: Path,
    rows: int | None,
    row_tokens: int,
    world: int,
    held_out: bool = False,
) -> dict[str, Any]:
    """Return the fields of `TrainingArguments`: those of the user, and defaults for the others.

    Args:
        recipe: The recipe.
        training: The fields that the user set.
        folder: Folder for checkpoints.
        rows: Number of rows of training data, or None for a stream.
        row_tokens: Tokens in a row.
        world: Number of processes that train together.
        held_out: Whether there is held-out text, which is measured at each checkpoint so that the best one is kept.

    Raises:
        InvalidValueError: A stream has no end.
    """
    batch = training.get("per_device_train_batch_size", BATCH_SIZE)
    steps = _steps(recipe, training, rows, row_tokens, batch * world)
    rate = LEARNING_RATES[recipe.train] * (DPO_SHARE if recipe.objective == "dpo" else 1)
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": batch,
        "learning_rate": rate,
        "lr_scheduler_type": SCHEDULE,
        "max_steps": steps,
        "warmup_steps": max(1, round(WARMUP_SHARE * steps)),
        "logging_steps": max(1, steps // LOGS),
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": max(1, steps // CHECKPOINTS),
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": not sys.stderr.isatty(),
        "ddp_find_unused_parameters": False,
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.accelerator.is_available(),
    }
    chosen = {**defaults, **training, "max_steps": steps, "output_dir": str(folder)}
    saves = chosen["save_strategy"]
    if held_out and saves != "no":
        chosen |= {"eval_strategy": "steps" if saves == "best" else saves, "eval_steps": chosen["save_steps"]}
        chosen["load_best_model_at_end"] = True
    if chosen["lr_scheduler_type"] == MHA2MLA_SCHEDULE:
        decay = {"num_decay_steps": max(1, round(DECAY_SHARE * steps)), "decay_type": "1-sqrt"}
        chosen = {"lr_scheduler_kwargs": decay, **chosen, "lr_scheduler_type": "warmup_stable_decay"}
    if recipe.objective == "dpo":
        # TRL turns both on by default, and it refuses bfloat16 on some devices.
        chosen = {"bf16": False, "gradient_checkpointing": False, **chosen}
    return chosen


def _steps(recipe: Recipe, training: dict[str, Any], rows: int | None, row_tokens: int, batch: int) -> int:
    """Return the number of optimizer steps; see `training_arguments`. A `batch` is that of all processes."""
    steps: int = training.get("max_steps", -1)
    if steps > 0:
        return steps
    per_step = batch * training.get("gradient_accumulation_steps", 1)
    if rows is not None:
        return max(1, math.ceil(math.ceil(rows / per_step) * training.get("num_train_epochs", 1)))
    if recipe.train_tokens is None:
        raise InvalidValueError("max_steps", steps, "integers from 1 where the data is streamed")
    return max(1, recipe.train_tokens // (per_step * row_tokens))
